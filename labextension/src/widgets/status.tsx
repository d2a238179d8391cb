import { ReactWidget, UseSignal } from '@jupyterlab/ui-components';
import type { TranslationBundle } from '@jupyterlab/translation';
import * as React from 'react';
import { formatBytes } from '../format';
import { agentsIcon } from '../icon';
import type { AgentsModel } from '../model';

/** `2 running · 512 MB / 1 GB`, which leads to the panel. */
export function statusWidget(
  model: AgentsModel,
  trans: TranslationBundle,
  onClick: () => void
): ReactWidget {
  const widget = ReactWidget.create(
    <UseSignal signal={model.stateChanged}>
      {() => (
        <button
          type="button"
          className="jp-agents-status-button"
          title={trans.__('Show Agents')}
          onClick={onClick}
        >
          <agentsIcon.react tag="span" width="14px" height="14px" />
          {statusText(model, trans)}
        </button>
      )}
    </UseSignal>
  );
  widget.addClass('jp-agents-status');
  return widget;
}

export function statusText(
  { connection, workspace, agents }: AgentsModel,
  trans: TranslationBundle
): string {
  if (connection === 'lost') {
    return trans.__('Agents: no connection');
  }
  if (workspace?.state !== 'ready') {
    return trans.__('Agents');
  }
  const running = agents.filter(agent => agent.state === 'running').length;
  const { memory } = workspace;
  return [
    trans._n('%1 running', '%1 running', running),
    memory &&
      `${memory.level === 'ok' ? '' : '⚠ '}${formatBytes(memory.used_bytes)} / ${formatBytes(memory.limit_bytes)}`
  ]
    .filter(part => part)
    .join(' · ');
}
