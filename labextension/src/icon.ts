import { LabIcon } from '@jupyterlab/ui-components';
import agentsSvg from '../style/agents.svg';

export const agentsIcon = new LabIcon({
  name: 'jupyter-agents:agents',
  svgstr: agentsSvg
});
