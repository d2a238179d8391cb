import { Dialog, showDialog } from '@jupyterlab/apputils';
import { addIcon, closeIcon } from '@jupyterlab/ui-components';
import * as React from 'react';
import {
  agentIdError,
  formatBytes,
  formatDuration,
  formatTime
} from '../format';
import type { IAgent } from '../tokens';
import {
  IconButton,
  Problem,
  stateWord,
  useAction,
  useAgents,
  useNow
} from './common';

/** The list of agents, of which one is selected; agents are created and removed here. */
export function Agents(): JSX.Element {
  const { model, trans } = useAgents();
  const { problem, act } = useAction();
  const limit = model.workspace?.limits.agents;

  const remove = async (agent: IAgent) => {
    const answer = await showDialog({
      title: trans.__('Remove agent %1?', agent.id),
      body: [
        agent.state === 'running' ? trans.__('Its run is stopped.') : '',
        trans.__(
          'All its files, its variables, its conversation and the logs of its runs are deleted. This can’t be undone.'
        )
      ]
        .join(' ')
        .trim(),
      buttons: [
        Dialog.cancelButton({ label: trans.__('Cancel') }),
        Dialog.warnButton({ label: trans.__('Remove') })
      ],
      defaultButton: 0
    });
    if (answer.button.accept) {
      await act(() => model.removeAgent(agent.id));
    }
  };

  return (
    <section className="jp-agents-agents" aria-label={trans.__('Agents')}>
      <div className="jp-agents-row">
        <h2>{trans.__('Agents')}</h2>
        {limit !== undefined && (
          <span className="jp-agents-count">
            {trans.__('%1 of %2', model.agents.length, limit)}
          </span>
        )}
      </div>
      {model.agents.length > 0 ? (
        <ul className="jp-agents-list">
          {model.agents.map(agent => (
            <Agent
              key={agent.id}
              agent={agent}
              onRemove={() => void remove(agent)}
            />
          ))}
        </ul>
      ) : (
        <p className="jp-agents-empty">
          {trans.__(
            'An agent is a folder with its own Claude conversation. Name one, tell it what to do, and watch it work. It sees its own files only.'
          )}
        </p>
      )}
      {problem && <Problem problem={problem} />}
      <Create />
    </section>
  );
}

function Agent(props: { agent: IAgent; onRemove: () => void }): JSX.Element {
  const { model, trans } = useAgents();
  const { agent } = props;
  const now = useNow(agent.state === 'running');
  const run = agent.last_run;
  let status = trans.__('No run yet');
  if (agent.state === 'running') {
    const memory = agent.run && model.workspace?.memory?.runs[agent.run];
    status = [
      run && formatDuration(now - run.started),
      memory && formatBytes(memory),
      agent.activity || trans.__('Running')
    ]
      .filter(part => part)
      .join(' · ');
  } else if (run) {
    status = `${stateWord(run.state, trans)} · ${formatTime(run.ended ?? run.started)}`;
  }
  return (
    <li
      className="jp-agents-agent"
      data-agent={agent.id}
      data-state={agent.state === 'running' ? 'running' : run?.state}
    >
      <button
        type="button"
        className="jp-agents-agent-select"
        aria-current={model.selected?.id === agent.id}
        title={trans.__('Drop files here to give them to %1', agent.id)}
        onClick={() => model.select(agent.id)}
      >
        <span className="jp-agents-dot" aria-hidden />
        <span className="jp-agents-agent-name">{agent.id}</span>
        <span className="jp-agents-agent-status">{status}</span>
      </button>
      <IconButton
        icon={closeIcon}
        label={trans.__('Remove %1', agent.id)}
        className="jp-agents-remove"
        onClick={props.onRemove}
      />
    </li>
  );
}

function Create(): JSX.Element {
  const { model, trans } = useAgents();
  const { busy, problem, act } = useAction();
  const [id, setId] = React.useState('');
  const limit = model.workspace?.limits.agents ?? Infinity;
  const full = model.agents.length >= limit;
  const ready = model.workspace?.state === 'ready';
  const hint = full
    ? trans.__('All %1 agents exist. Remove one to create another.', limit)
    : agentIdError(
        id,
        model.agents.map(agent => agent.id),
        trans
      );
  return (
    <form
      className="jp-agents-create"
      onSubmit={event => {
        event.preventDefault();
        if (id && !hint && !busy) {
          void act(async () => {
            await model.createAgent(id);
            setId('');
          });
        }
      }}
    >
      <div className="jp-agents-row">
        <input
          className="jp-agents-create-name"
          aria-label={trans.__('Name of a new agent')}
          aria-describedby="jp-agents-create-hint"
          aria-invalid={!full && !!hint}
          placeholder={trans.__('New agent, e.g. data-cleaner')}
          spellCheck={false}
          autoComplete="off"
          disabled={full || !ready}
          value={id}
          onChange={event => setId(event.target.value)}
        />
        <button
          className="jp-agents-button"
          disabled={!id || !!hint || busy || !ready}
        >
          <addIcon.react tag="span" width="12px" height="12px" />
          {trans.__('Create')}
        </button>
      </div>
      <div id="jp-agents-create-hint" className="jp-agents-hint" role="status">
        {hint}
      </div>
      {problem && <Problem problem={problem} />}
    </form>
  );
}
