import { Notification } from '@jupyterlab/apputils';
import { PathExt } from '@jupyterlab/coreutils';
import {
  FileBrowser,
  IFileBrowserFactory,
  Uploader
} from '@jupyterlab/filebrowser';
import type { ITranslator } from '@jupyterlab/translation';
import {
  downloadIcon,
  LabIcon,
  newFolderIcon,
  ReactWidget,
  refreshIcon,
  ToolbarButton,
  UseSignal
} from '@jupyterlab/ui-components';
import type { Drag } from '@lumino/dragdrop';
import type { Message } from '@lumino/messaging';
import { Signal } from '@lumino/signaling';
import { Panel } from '@lumino/widgets';
import * as React from 'react';
import type { AgentsDrive } from '../drive';
import { agentsIcon } from '../icon';
import { Agents } from './agents';
import { Changes } from './changes';
import {
  Context,
  IContext,
  Problem,
  problemOf,
  useAction,
  useAgents,
  useNow
} from './common';
import { Environment } from './environment';
import { Image } from './image';
import { Memory } from './memory';
import { RunView } from './run';

/** What JupyterLab's file browser calls the paths that it drags. */
const PATHS_MIME = 'application/x-jupyter-icontents';

const TABS = ['run', 'files', 'changes', 'environment'] as const;
export type Tab = (typeof TABS)[number];

/** The side panel. All but the file browser, which is a Lumino widget, is one React tree over the model. */
export class AgentsPanel extends Panel {
  constructor(private readonly _options: AgentsPanel.IOptions) {
    super();
    const { context } = _options;
    this.id = 'jupyter-agents-panel';
    this.addClass('jp-agents-panel');
    this.title.icon = agentsIcon;
    this.title.caption = context.trans.__('Agents');
    this.node.setAttribute('role', 'region');
    this.node.setAttribute('aria-label', context.trans.__('Agents'));
    const main = ReactWidget.create(
      <Context.Provider value={context}>
        <UseSignal signal={context.model.stateChanged}>
          {() => (
            <UseSignal signal={this.tabChanged}>
              {() => <Main panel={this} />}
            </UseSignal>
          )}
        </UseSignal>
      </Context.Provider>
    );
    main.addClass('jp-agents-main');
    this.addWidget(main);
    context.model.stateChanged.connect(this._syncFiles, this);
    this.tab = 'run';
  }

  readonly tabChanged = new Signal<this, void>(this);

  /** Which of the selected agent's views is shown. */
  get tab(): Tab {
    return this._tab;
  }
  set tab(tab: Tab) {
    this._tab = TABS.includes(tab) ? tab : 'run';
    this.node.dataset.tab = this._tab;
    this._syncFiles();
    this.tabChanged.emit();
  }

  dispose(): void {
    Signal.clearData(this);
    super.dispose();
  }

  /** Put files or folders into an agent's folder. */
  async give(agent: string, files: FileList | string[]): Promise<void> {
    const { drive, context } = this._options;
    const copy = async (path: string, folder: string): Promise<void> => {
      const options = { content: false };
      const { type, name } = await context.contents.get(path, options);
      const target = `${folder}/${name}`;
      if (type === 'directory') {
        await drive.save(target, { type });
        const { content } = await context.contents.get(path);
        for (const child of content) {
          await copy(PathExt.join(path, child.name), target);
        }
      } else {
        const file = { type: 'file', format: 'base64', content: true } as const;
        await drive.save(target, await context.contents.get(path, file));
      }
    };
    for (const file of Array.from<File | string>(files)) {
      await (typeof file === 'string'
        ? copy(file, agent)
        : drive.upload(`${agent}/${file.name}`, file));
    }
  }

  handleEvent(event: Event): void {
    const target = (event.target as HTMLElement)
      .closest('[data-agent]')
      ?.getAttribute('data-agent');
    // JupyterLab's own drags come as `lm-` events, which are DragEvents too.
    const own = event.type.startsWith('lm-');
    const files = own
      ? (event as Drag.Event).mimeData.hasData(PATHS_MIME)
      : (event as DragEvent).dataTransfer?.types.includes('Files');
    this._mark(null);
    if (!target || !files) {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
    if (event.type.endsWith('over')) {
      this._mark(target);
    }
    if (own) {
      const drag = event as Drag.Event;
      drag.dropAction = drag.proposedAction;
      if (drag.type === 'lm-drop') {
        this._give(target, drag.mimeData.getData(PATHS_MIME));
      }
    } else if (event.type === 'drop') {
      this._give(target, (event as DragEvent).dataTransfer!.files);
    }
  }

  protected onAfterAttach(msg: Message): void {
    super.onAfterAttach(msg);
    for (const type of DRAG_EVENTS) {
      this.widgets[0].node.addEventListener(type, this);
    }
  }

  protected onBeforeDetach(msg: Message): void {
    for (const type of DRAG_EVENTS) {
      this.widgets[0].node.removeEventListener(type, this);
    }
    super.onBeforeDetach(msg);
  }

  protected onBeforeShow(msg: Message): void {
    super.onBeforeShow(msg);
    this._options.context.model.connect();
  }

  protected onActivateRequest(msg: Message): void {
    super.onActivateRequest(msg);
    this.node
      .querySelector<HTMLElement>(
        '.jp-agents-prompt-text, .jp-agents-create-name, button'
      )
      ?.focus();
  }

  private _give(agent: string, files: FileList | string[]): void {
    const { trans } = this._options.context;
    const names = Array.from<File | string>(files).map(file =>
      typeof file === 'string' ? PathExt.basename(file) : file.name
    );
    const what = names.join(', ');
    void Notification.promise(
      this.give(agent, files).then(() => null),
      {
        pending: { message: trans.__('Giving %1 to %2…', what, agent) },
        success: {
          message: () => trans.__('%1 has %2.', agent, what),
          options: { autoClose: 5_000 }
        },
        error: { message: error => problemOf(error).message }
      }
    );
  }

  private _mark(agent: string | null): void {
    for (const node of this.node.querySelectorAll('[data-agent]')) {
      node.classList.toggle(
        'jp-agents-drop',
        node.getAttribute('data-agent') === agent
      );
    }
  }

  /** Show the selected agent's folder while the tab is open. */
  private _syncFiles(): void {
    const { model } = this._options.context;
    const agent = model.selected;
    const show = this._tab === 'files' && !!agent;
    if (show && !this._files) {
      this._files = this._createFiles();
    }
    this._files?.setHidden(!show);
    if (!show || !this._files) {
      return;
    }
    // The run's end is when files have changed most likely.
    const shown = `${agent.id} ${agent.last_run?.id} ${agent.state}`;
    if (shown !== this._shownFiles) {
      const moved = shown.split(' ')[0] !== this._shownFiles.split(' ')[0];
      this._shownFiles = shown;
      void (moved
        ? this._files.model.cd(`/${agent.id}`)
        : this._files.model.refresh());
    }
  }

  private _createFiles(): FileBrowser | null {
    const { browsers, context, translator, drive } = this._options;
    if (!browsers) {
      return null;
    }
    const { trans, model } = context;
    const files = browsers.createFileBrowser('jp-agents-files', {
      driveName: drive.name,
      auto: false,
      restore: false,
      state: null
    });
    files.addClass('jp-agents-files');
    files.toolbar.node.setAttribute('aria-label', trans.__('Files'));
    const button = (
      name: string,
      icon: LabIcon,
      tooltip: string,
      onClick: () => unknown
    ) =>
      files.toolbar.addItem(
        name,
        new ToolbarButton({ icon, tooltip, onClick: () => void onClick() })
      );
    files.toolbar.addItem(
      'upload',
      new Uploader({ model: files.model, translator })
    );
    button('folder', newFolderIcon, trans.__('New folder'), () =>
      files.createNewDirectory()
    );
    button('refresh', refreshIcon, trans.__('Refresh'), () =>
      files.model.refresh()
    );
    button(
      'download',
      downloadIcon,
      trans.__('Download all as tar'),
      async () => {
        const agent = model.selected;
        if (agent) {
          const link = document.createElement('a');
          link.href = `${await drive.getDownloadUrl(`${agent.id}/`)}?format=tar`;
          link.download = `${agent.id}.tar`;
          link.click();
        }
      }
    );
    this.addWidget(files);
    return files;
  }

  private _files: FileBrowser | null = null;
  private _shownFiles = '';
  private _tab: Tab = 'run';
}

const DRAG_EVENTS = [
  'dragover',
  'dragleave',
  'drop',
  'lm-dragenter',
  'lm-dragleave',
  'lm-dragover',
  'lm-drop'
];

export namespace AgentsPanel {
  export interface IOptions {
    context: IContext;
    drive: AgentsDrive;
    browsers: IFileBrowserFactory | null;
    translator: ITranslator;
  }
}

function Main({ panel }: { panel: AgentsPanel }): JSX.Element {
  const { model, trans } = useAgents();
  const agent = model.selected;
  const names: Record<Tab, string> = {
    run: trans.__('Run'),
    files: trans.__('Files'),
    changes: trans.__('Changes'),
    environment: trans.__('Variables')
  };
  const hidden = (tab: Tab) => panel.tab !== tab;
  return (
    <>
      <Connection />
      <Image />
      {model.workspace && model.workspace.state !== 'unavailable' && (
        <>
          <Memory />
          <Agents />
        </>
      )}
      {agent && (
        <div className="jp-agents-detail" data-agent={agent.id}>
          <div
            className="jp-agents-tabs"
            role="tablist"
            aria-label={agent.id}
            onKeyDown={event => {
              const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
              if (step) {
                const at = TABS.indexOf(panel.tab) + step + TABS.length;
                panel.tab = TABS[at % TABS.length];
                event.currentTarget
                  .querySelector<HTMLElement>(`#jp-agents-tab-${panel.tab}`)
                  ?.focus();
              }
            }}
          >
            {TABS.map(tab => (
              <button
                key={tab}
                type="button"
                role="tab"
                id={`jp-agents-tab-${tab}`}
                className="jp-agents-tab"
                aria-selected={panel.tab === tab}
                tabIndex={panel.tab === tab ? 0 : -1}
                onClick={() => (panel.tab = tab)}
              >
                {names[tab]}
              </button>
            ))}
          </div>
          <TabPanel tab="run" hidden={hidden('run')}>
            <RunView agent={agent} />
          </TabPanel>
          {!hidden('changes') && (
            <TabPanel tab="changes">
              <Changes agent={agent} />
            </TabPanel>
          )}
          {!hidden('environment') && (
            <TabPanel tab="environment">
              <Environment agent={agent.id} key={agent.id} />
            </TabPanel>
          )}
        </div>
      )}
    </>
  );
}

function TabPanel(props: {
  tab: Tab;
  hidden?: boolean;
  children: React.ReactNode;
}): JSX.Element {
  return (
    <div
      role="tabpanel"
      className="jp-agents-tab-panel"
      aria-labelledby={`jp-agents-tab-${props.tab}`}
      hidden={props.hidden}
    >
      {props.children}
    </div>
  );
}

/** Whatever keeps the workspace from being used, and how to get on. */
function Connection(): JSX.Element | null {
  const { model, trans } = useAgents();
  const { busy, problem, act } = useAction();
  const now = useNow(model.connection === 'lost');
  const { workspace } = model;
  const start = (label: string) => (
    <button
      type="button"
      className="jp-agents-button jp-agents-start"
      disabled={busy}
      onClick={() => void act(() => model.startWorkspace())}
    >
      {busy ? trans.__('Starting…') : label}
    </button>
  );
  let content: React.ReactNode = null;
  if (model.connection === 'lost') {
    const seconds = Math.max(0, Math.ceil(model.retryAt / 1000 - now));
    content = (
      <>
        {model.problem ? (
          <Problem problem={model.problem} />
        ) : (
          <div className="jp-agents-problem" role="alert">
            {trans.__(
              'The Jupyter server does not answer. Agents that run go on; what they do appears here when it is back.'
            )}
          </div>
        )}
        <div className="jp-agents-row">
          <span>{trans.__('Trying again in %1 s', seconds)}</span>
          <button
            type="button"
            className="jp-agents-button"
            onClick={() => model.connect()}
          >
            {trans.__('Try now')}
          </button>
        </div>
      </>
    );
  } else if (workspace?.state === 'unavailable') {
    content = (
      <>
        {workspace.problem && <Problem problem={workspace.problem} />}
        {start(trans.__('Try again'))}
      </>
    );
  } else if (workspace?.state === 'stopped' && model.connection === 'open') {
    content = (
      <>
        <p>{trans.__('The workspace is stopped. Its files are kept.')}</p>
        {start(trans.__('Start'))}
      </>
    );
  } else if (!workspace || workspace.state === 'starting') {
    content = <p role="status">{trans.__('Starting the workspace…')}</p>;
  }
  return (
    content && (
      <div className="jp-agents-connection">
        {content}
        {problem && <Problem problem={problem} />}
      </div>
    )
  );
}
