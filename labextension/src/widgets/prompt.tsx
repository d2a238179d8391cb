import { runIcon, stopIcon } from '@jupyterlab/ui-components';
import * as React from 'react';
import { IAgent, IRunRequest, PERMISSION_MODES } from '../tokens';
import { Problem, Select, useAction, useAgents } from './common';

/** Where the next run is written and the present one is stopped. */
export function Prompt({ agent }: { agent: IAgent }): JSX.Element {
  const { model, trans, runDefaults } = useAgents();
  const { busy, problem, act } = useAction();
  const stopping = useAction();
  const [options, setOptions] = React.useState(runDefaults);
  const [fresh, setFresh] = React.useState(false);
  const [, redraw] = React.useReducer((n: number) => n + 1, 0);
  const text = model.drafts.get(agent.id) ?? '';
  const setText = (text: string) => {
    model.drafts.set(agent.id, text);
    redraw();
  };

  const running = agent.state === 'running';
  const limit = model.workspace?.limits.runs ?? Infinity;
  const active = model.agents.filter(other => other.state === 'running');
  let off = '';
  if (model.connection !== 'open') {
    off = trans.__('There is no connection.');
  } else if (running) {
    off = trans.__('%1 works; write the next prompt meanwhile.', agent.id);
  } else if (active.length >= limit) {
    off = trans.__(
      '%1 of %2 runs are active. Wait for one or stop it: %3.',
      active.length,
      limit,
      active.map(other => other.id).join(', ')
    );
  }

  const submit = () => {
    const prompt = text;
    if (off || busy || !prompt.trim()) {
      return;
    }
    const request: IRunRequest = {
      prompt,
      continue: !fresh,
      permission_mode: options.permissionMode
    };
    if (options.model.trim()) {
      request.model = options.model.trim();
    }
    if (options.maxTurns) {
      request.max_turns = options.maxTurns;
    }
    if (options.maxBudgetUsd) {
      request.max_budget_usd = options.maxBudgetUsd;
    }
    void act(async () => {
      await model.startRun(agent.id, request);
      model.drafts.delete(agent.id);
      setFresh(false);
    });
  };

  const example = trans.__(
    'Write a Python script that draws a Mandelbrot set as text, and run it.'
  );
  return (
    <form
      className="jp-agents-prompt"
      onSubmit={event => {
        event.preventDefault();
        submit();
      }}
    >
      {!agent.last_run && !text && (
        <button
          type="button"
          className="jp-agents-link jp-agents-example"
          onClick={() => setText(example)}
        >
          {trans.__('Try: %1', example)}
        </button>
      )}
      <textarea
        className="jp-agents-prompt-text"
        aria-label={trans.__('Prompt for %1', agent.id)}
        aria-describedby="jp-agents-prompt-hint"
        placeholder={trans.__('What should %1 do?', agent.id)}
        rows={3}
        value={text}
        onChange={event => setText(event.target.value)}
      />
      <div className="jp-agents-row">
        <label className="jp-agents-check">
          <input
            type="checkbox"
            className="jp-agents-continue"
            checked={agent.has_session && !fresh}
            disabled={!agent.has_session}
            onChange={event => setFresh(!event.target.checked)}
          />
          {trans.__('Continue the conversation')}
        </label>
        {running && (
          <button
            type="button"
            className="jp-agents-button jp-agents-stop"
            disabled={stopping.busy}
            onClick={() =>
              void stopping.act(async () => {
                if (agent.run) {
                  await model.cancelRun(agent.run);
                }
              })
            }
          >
            <stopIcon.react tag="span" width="14px" height="14px" />
            {stopping.busy ? trans.__('Stopping…') : trans.__('Stop')}
          </button>
        )}
        <button
          className="jp-agents-button jp-agents-accept jp-agents-run"
          title={trans.__('Run (Ctrl or Cmd + Enter)')}
          aria-describedby="jp-agents-prompt-hint"
          disabled={!!off || busy || !text.trim()}
        >
          <runIcon.react tag="span" width="14px" height="14px" />
          {trans.__('Run')}
        </button>
      </div>
      <div id="jp-agents-prompt-hint" className="jp-agents-hint" role="status">
        {off}
      </div>
      {problem && <Problem problem={problem} />}
      {stopping.problem && <Problem problem={stopping.problem} />}
      <details className="jp-agents-options">
        <summary>{trans.__('Options')}</summary>
        <label>
          {trans.__('Model')}
          <input
            className="jp-agents-option-model"
            placeholder={trans.__('Default')}
            list="jp-agents-models"
            maxLength={200}
            value={options.model}
            onChange={event =>
              setOptions({ ...options, model: event.target.value })
            }
          />
          <datalist id="jp-agents-models">
            <option value="opus" />
            <option value="sonnet" />
            <option value="haiku" />
          </datalist>
        </label>
        <label>
          {trans.__('Permission mode')}
          <Select
            className="jp-agents-option-permission"
            value={options.permissionMode}
            onChange={event =>
              setOptions({ ...options, permissionMode: event.target.value })
            }
          >
            {PERMISSION_MODES.map(mode => (
              <option key={mode}>{mode}</option>
            ))}
          </Select>
        </label>
        <label>
          {trans.__('Turns at most')}
          <input
            className="jp-agents-option-turns"
            type="number"
            min={1}
            max={10000}
            step={1}
            placeholder={trans.__('No limit')}
            value={options.maxTurns ?? ''}
            onChange={event =>
              setOptions({ ...options, maxTurns: +event.target.value || null })
            }
          />
        </label>
        <label>
          {trans.__('Budget in US$')}
          <input
            className="jp-agents-option-budget"
            type="number"
            min={0.01}
            step="any"
            placeholder={trans.__('No limit')}
            value={options.maxBudgetUsd ?? ''}
            onChange={event =>
              setOptions({
                ...options,
                maxBudgetUsd: +event.target.value || null
              })
            }
          />
        </label>
      </details>
    </form>
  );
}
