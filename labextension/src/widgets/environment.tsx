import { closeIcon } from '@jupyterlab/ui-components';
import * as React from 'react';
import { envNameError } from '../format';
import { IconButton, Problem, useAction, useAgents } from './common';

/** The agent's environment variables: names are shown, values only go in. */
export function Environment({ agent }: { agent: string }): JSX.Element {
  const { model, trans } = useAgents();
  const { busy, problem, act } = useAction();
  const [names, setNames] = React.useState<string[] | null>(null);
  const [name, setName] = React.useState('');
  const [value, setValue] = React.useState('');
  const hint = envNameError(name, trans);

  React.useEffect(() => {
    void act(async () => setNames(await model.env(agent)));
  }, [act, model, agent]);

  const set = (name: string, value: string | null) =>
    act(async () => {
      setNames(await model.setEnv(agent, name, value));
      if (value !== null) {
        setName('');
        setValue('');
      }
    });

  return (
    <div className="jp-agents-environment" aria-busy={busy}>
      {names?.length === 0 && (
        <p className="jp-agents-empty">
          {trans.__(
            'Variables reach every later run of this agent: keys it works with, or ANTHROPIC_API_KEY to use your own account.'
          )}
        </p>
      )}
      {names && names.length > 0 && (
        <ul className="jp-agents-names" aria-label={trans.__('Variables')}>
          {names.map(name => (
            <li key={name}>
              <code>{name}</code>
              <span className="jp-agents-secret" aria-hidden>
                ••••••
              </span>
              <IconButton
                icon={closeIcon}
                label={trans.__('Remove %1', name)}
                className="jp-agents-remove"
                onClick={() => void set(name, null)}
              />
            </li>
          ))}
        </ul>
      )}
      <form
        className="jp-agents-env-form"
        autoComplete="off"
        onSubmit={event => {
          event.preventDefault();
          if (name && !hint) {
            void set(name, value);
          }
        }}
      >
        <label>
          {trans.__('Name')}
          <input
            className="jp-agents-env-name"
            aria-invalid={!!hint}
            aria-describedby="jp-agents-env-hint"
            spellCheck={false}
            autoComplete="off"
            value={name}
            onChange={event => setName(event.target.value)}
          />
        </label>
        <div id="jp-agents-env-hint" className="jp-agents-hint" role="status">
          {hint}
        </div>
        <label>
          {trans.__('Value')}
          <input
            className="jp-agents-env-value"
            type="password"
            aria-describedby="jp-agents-env-note"
            autoComplete="new-password"
            value={value}
            onChange={event => setValue(event.target.value)}
          />
        </label>
        <p id="jp-agents-env-note" className="jp-agents-note">
          {trans.__(
            'A value is never shown again, but the agent itself can read it and use it.'
          )}
        </p>
        <button className="jp-agents-button" disabled={!name || !!hint}>
          {names?.includes(name) ? trans.__('Replace') : trans.__('Add')}
        </button>
      </form>
      {problem && <Problem problem={problem} />}
    </div>
  );
}
