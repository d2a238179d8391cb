import * as React from 'react';
import { Problem, Select, useAction, useAgents } from './common';

/** The image that the workspace is made from, where the administrator allows a choice. */
export function Image(): JSX.Element | null {
  const { model, trans } = useAgents();
  const { busy, problem, act } = useAction();
  const { workspace } = model;
  if (!workspace || workspace.images.length < 2) {
    return null;
  }
  const image = workspace.image ?? '';
  const active = workspace.active_runs > 0;
  return (
    <section className="jp-agents-image" aria-label={trans.__('Image')}>
      <div className="jp-agents-row">
        <h2>{trans.__('Image')}</h2>
        <Select
          aria-label={trans.__('Image of the workspace')}
          title={
            active
              ? trans.__('Runs are active: wait for them or stop them')
              : trans.__('The programs that agents have; files stay')
          }
          disabled={active || busy || model.connection !== 'open'}
          value={image}
          onChange={event => {
            const chosen = event.target.value;
            void act(() => model.chooseImage(chosen));
          }}
        >
          {!workspace.images.includes(image) && (
            <option disabled>{image}</option>
          )}
          {workspace.images.map(name => (
            <option key={name}>{name}</option>
          ))}
        </Select>
      </div>
      {problem && <Problem problem={problem} />}
    </section>
  );
}
