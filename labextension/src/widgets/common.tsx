/** What the views share. */
import { Clipboard } from '@jupyterlab/apputils';
import type { INotebookTracker } from '@jupyterlab/notebook';
import type { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import type { Contents } from '@jupyterlab/services';
import type { TranslationBundle } from '@jupyterlab/translation';
import {
  caretDownIcon,
  checkIcon,
  copyIcon,
  LabIcon
} from '@jupyterlab/ui-components';
import * as React from 'react';
import type { AgentsModel } from '../model';
import { RequestError } from '../request';
import type { IProblem, IRun, IRunDefaults } from '../tokens';

export interface IContext {
  model: AgentsModel;
  trans: TranslationBundle;
  rendermime: IRenderMimeRegistry;
  contents: Contents.IManager;
  notebooks: INotebookTracker | null;
  /** Read when a form is filled in, so that a changed setting counts from then on. */
  runDefaults: () => IRunDefaults;
}

export const Context = React.createContext<IContext | null>(null);

export function useAgents(): IContext {
  const context = React.useContext(Context);
  if (!context) {
    throw new Error('An agents view is outside of its context.');
  }
  return context;
}

/** Seconds since the epoch, kept up to date while `ticking`. */
export function useNow(ticking: boolean): number {
  const [now, setNow] = React.useState(Date.now());
  React.useEffect(() => {
    if (ticking) {
      setNow(Date.now());
      const timer = setInterval(() => setNow(Date.now()), 1000);
      return () => clearInterval(timer);
    }
  }, [ticking]);
  return now / 1000;
}

/** For something that takes time and can fail: whether it is under way, what went wrong, and how to start it. */
export function useAction(): {
  busy: boolean;
  problem: IProblem | null;
  act: (action: () => Promise<void>) => Promise<void>;
} {
  const [busy, setBusy] = React.useState(false);
  const [problem, setProblem] = React.useState<IProblem | null>(null);
  const act = React.useCallback(async (action: () => Promise<void>) => {
    setBusy(true);
    setProblem(null);
    try {
      await action();
    } catch (error) {
      setProblem(problemOf(error));
    } finally {
      setBusy(false);
    }
  }, []);
  return { busy, problem, act };
}

export function problemOf(error: unknown): IProblem {
  return error instanceof RequestError
    ? error.problem
    : {
        message: error instanceof Error ? error.message : `${error}`,
        reason: ''
      };
}

/** What is wrong, in a sentence, with the command that mends it. */
export function Problem({ problem }: { problem: IProblem }): JSX.Element {
  return (
    <div className="jp-agents-problem" role="alert">
      <span>{problem.message}</span>
      {problem.command && (
        <div className="jp-agents-command">
          <code>{problem.command}</code>
          <CopyButton text={problem.command} />
        </div>
      )}
    </div>
  );
}

export function IconButton(props: {
  icon: LabIcon;
  label: string;
  onClick: () => void;
  className?: string;
}): JSX.Element {
  return (
    <button
      type="button"
      className={`jp-agents-icon-button ${props.className ?? ''}`}
      aria-label={props.label}
      title={props.label}
      onClick={props.onClick}
    >
      <props.icon.react tag="span" width="14px" height="14px" />
    </button>
  );
}

export function CopyButton({ text }: { text: string }): JSX.Element {
  const { trans } = useAgents();
  const [copied, setCopied] = React.useState(false);
  React.useEffect(() => {
    if (copied) {
      const timer = setTimeout(() => setCopied(false), 1500);
      return () => clearTimeout(timer);
    }
  }, [copied]);
  return (
    <IconButton
      icon={copied ? checkIcon : copyIcon}
      label={copied ? trans.__('Copied') : trans.__('Copy')}
      className="jp-agents-copy"
      onClick={() => {
        Clipboard.copyToSystem(text);
        setCopied(true);
      }}
    />
  );
}

/** A native choice with JupyterLab's arrow. */
export function Select(
  props: React.SelectHTMLAttributes<HTMLSelectElement>
): JSX.Element {
  return (
    <span className="jp-agents-select">
      <select {...props} />
      <caretDownIcon.react tag="span" />
    </span>
  );
}

/** Text as it is, of which long ones are shown piece by piece. */
export function LongText({ text }: { text: string }): JSX.Element {
  const [shown, more] = usePieces(text, 4000);
  return (
    <>
      <pre className="jp-agents-pre">{shown}</pre>
      {more}
    </>
  );
}

/** The beginning of a text, and a button that shows more of it where there is more. */
export function usePieces(
  text: string,
  length: number
): [shown: string, more: JSX.Element | null] {
  const { trans } = useAgents();
  const [pieces, setPieces] = React.useState(1);
  const hidden = text.length - pieces * length;
  return [
    hidden > 0 ? text.slice(0, pieces * length) : text,
    hidden > 0 ? (
      <button
        type="button"
        className="jp-agents-link jp-agents-more"
        onClick={() => setPieces(2 * pieces)}
      >
        {trans.__('Show more (%1 characters left)', hidden.toLocaleString())}
      </button>
    ) : null
  ];
}

export function stateWord(
  state: IRun['state'],
  trans: TranslationBundle
): string {
  return {
    running: trans.__('Running'),
    succeeded: trans.__('Succeeded'),
    failed: trans.__('Failed'),
    cancelled: trans.__('Stopped'),
    timed_out: trans.__('Timed out'),
    oom_killed: trans.__('Out of memory'),
    lost: trans.__('Lost')
  }[state];
}
