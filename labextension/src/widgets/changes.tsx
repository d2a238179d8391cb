import { refreshIcon } from '@jupyterlab/ui-components';
import * as React from 'react';
import { IDiffFile, parseDiff } from '../diff';
import type { IAgent } from '../tokens';
import { IconButton, Problem, useAction, useAgents } from './common';

/** How many lines of a file are shown at first. */
const LINES = 300;

/** What the agent's last run changed. */
export function Changes({ agent }: { agent: IAgent }): JSX.Element {
  const { model, trans } = useAgents();
  const { busy, problem, act } = useAction();
  const [files, setFiles] = React.useState<IDiffFile[] | null>(null);
  const current = React.useRef('');
  const load = React.useCallback(
    () =>
      act(async () => {
        current.current = agent.id;
        const diff = await model.diff(agent.id);
        if (current.current === agent.id) {
          setFiles(parseDiff(diff));
        }
      }),
    [act, model, agent.id]
  );
  const runState = `${agent.last_run?.id} ${agent.last_run?.state}`;
  React.useEffect(() => {
    setFiles(null);
    void load();
  }, [load, runState]);

  return (
    <div className="jp-agents-changes" aria-busy={busy}>
      <div className="jp-agents-row">
        <span>
          {files &&
            trans._n('%1 file changed', '%1 files changed', files.length)}
        </span>
        <IconButton
          icon={refreshIcon}
          label={trans.__('Refresh')}
          onClick={() => void load()}
        />
      </div>
      {problem && <Problem problem={problem} />}
      {files?.length === 0 && (
        <p className="jp-agents-empty">
          {agent.last_run
            ? trans.__('The last run changed no files.')
            : trans.__(
                'After a run, this shows line by line what it changed in the agent’s files.'
              )}
        </p>
      )}
      {files?.map((file, index) => (
        <File key={`${index} ${file.name}`} file={file} />
      ))}
    </div>
  );
}

function File({ file }: { file: IDiffFile }): JSX.Element {
  const { trans } = useAgents();
  const [limit, setLimit] = React.useState(LINES);
  return (
    <details className="jp-agents-diff" open>
      <summary>
        <span className="jp-agents-diff-name">{file.name}</span>
        <span className="jp-agents-diff-added">+{file.added}</span>
        <span className="jp-agents-diff-removed">−{file.removed}</span>
      </summary>
      <pre tabIndex={0} aria-label={file.name}>
        {file.lines.slice(0, limit).map((line, index) => (
          <div key={index} data-line={line[0]}>
            {line.slice(0, 2000) || ' '}
          </div>
        ))}
      </pre>
      {file.lines.length > limit && (
        <button
          type="button"
          className="jp-agents-link jp-agents-more"
          onClick={() => setLimit(2 * limit)}
        >
          {trans.__('Show more (%1 lines left)', file.lines.length - limit)}
        </button>
      )}
    </details>
  );
}
