import {
  ILayoutRestorer,
  JupyterFrontEnd,
  JupyterFrontEndPlugin
} from '@jupyterlab/application';
import { ICommandPalette, Notification } from '@jupyterlab/apputils';
import { IFileBrowserFactory } from '@jupyterlab/filebrowser';
import { ILauncher } from '@jupyterlab/launcher';
import { INotebookTracker } from '@jupyterlab/notebook';
import { IRenderMimeRegistry } from '@jupyterlab/rendermime';
import { ISettingRegistry } from '@jupyterlab/settingregistry';
import { IStateDB } from '@jupyterlab/statedb';
import { IStatusBar } from '@jupyterlab/statusbar';
import { ITranslator, nullTranslator } from '@jupyterlab/translation';
import { AgentsDrive } from './drive';
import { agentsIcon } from './icon';
import { AgentsModel } from './model';
import { CommandIDs, IAgentsModel, IRunDefaults } from './tokens';
import { stateWord } from './widgets/common';
import { AgentsPanel, Tab } from './widgets/panel';
import { statusWidget } from './widgets/status';

const DOMAIN = 'jupyter_agents';

const model: JupyterFrontEndPlugin<AgentsModel> = {
  id: 'jupyter-agents:model',
  description: 'Knows the state of the agents.',
  autoStart: true,
  provides: IAgentsModel,
  activate: app => {
    const model = new AgentsModel(app.serviceManager.serverSettings);
    // Without a server extension there is nothing to see; the panel tells why when it is opened.
    void app.started.then(() => model.peek()).catch(() => undefined);
    return model;
  }
};

const panel: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-agents:panel',
  description: 'The side panel, its commands and the drive of agents’ files.',
  autoStart: true,
  requires: [IAgentsModel, IRenderMimeRegistry],
  optional: [
    ITranslator,
    ISettingRegistry,
    IStateDB,
    ILayoutRestorer,
    ICommandPalette,
    ILauncher,
    INotebookTracker,
    IFileBrowserFactory
  ],
  activate: (
    app: JupyterFrontEnd,
    model: AgentsModel,
    rendermime: IRenderMimeRegistry,
    translator: ITranslator | null,
    registry: ISettingRegistry | null,
    state: IStateDB | null,
    restorer: ILayoutRestorer | null,
    palette: ICommandPalette | null,
    launcher: ILauncher | null,
    notebooks: INotebookTracker | null,
    browsers: IFileBrowserFactory | null
  ) => {
    const trans = (translator ?? nullTranslator).load(DOMAIN);
    const { contents } = app.serviceManager;
    const drive = new AgentsDrive(app.serviceManager.serverSettings);
    contents.addDrive(drive);

    let settings: ISettingRegistry.ISettings | undefined;
    registry
      ?.load(panel.id)
      .then(loaded => (settings = loaded))
      .catch(reason => console.error('Settings of jupyter-agents', reason));

    const widget = new AgentsPanel({
      context: {
        model,
        trans,
        rendermime,
        contents,
        notebooks,
        runDefaults: () => ({
          ...RUN_DEFAULTS,
          ...(settings?.composite as Partial<IRunDefaults>)
        })
      },
      drive,
      browsers,
      translator: translator ?? nullTranslator
    });
    app.shell.add(widget, 'right', { rank: 900 });
    restorer?.add(widget, widget.id);

    const key = `${panel.id}:shown`;
    let shown = '';
    const remember = () => {
      const next = JSON.stringify([model.selected?.id ?? null, widget.tab]);
      if (model.selected && next !== shown) {
        shown = next;
        void state?.save(key, shown);
      }
    };
    void state?.fetch(key).then(value => {
      if (typeof value === 'string' && !model.selected) {
        const [agent, tab] = JSON.parse(value);
        model.select(agent);
        widget.tab = tab as Tab;
      }
    });
    model.stateChanged.connect(remember);
    widget.tabChanged.connect(remember);

    model.runEnded.connect((_, run) => {
      if (widget.isVisible || settings?.composite.notify === false) {
        return;
      }
      Notification.emit(
        trans.__('%1: %2', run.agent, stateWord(run.state, trans)),
        run.state === 'succeeded' ? 'success' : 'warning',
        {
          autoClose: 10_000,
          actions: [
            {
              label: trans.__('Show'),
              callback: () => {
                model.select(run.agent);
                model.showRun(run.id);
                widget.tab = 'run';
                app.shell.activateById(widget.id);
              }
            }
          ]
        }
      );
    });

    const { commands } = app;
    const category = trans.__('Agents');
    commands.addCommand(CommandIDs.show, {
      label: args =>
        args.isLauncher ? trans.__('Agents') : trans.__('Show Agents'),
      caption: trans.__('Show the agents, their memory and their runs'),
      icon: args => (args.isPalette ? undefined : agentsIcon),
      describedBy: NO_ARGS,
      execute: () => app.shell.activateById(widget.id)
    });
    commands.addCommand(CommandIDs.create, {
      label: trans.__('New Agent'),
      describedBy: NO_ARGS,
      execute: () => {
        app.shell.activateById(widget.id);
        widget.node
          .querySelector<HTMLElement>('.jp-agents-create-name')
          ?.focus();
      }
    });
    commands.addCommand(CommandIDs.run, {
      label: trans.__('Run the Agent’s Prompt'),
      describedBy: NO_ARGS,
      execute: () =>
        widget.node
          .querySelector<HTMLFormElement>('.jp-agents-prompt')
          ?.requestSubmit()
    });
    commands.addCommand(CommandIDs.stop, {
      label: trans.__('Stop the Agent’s Run'),
      describedBy: NO_ARGS,
      isEnabled: () => !!model.selected?.run,
      execute: async () => {
        const run = model.selected?.run;
        if (run) {
          await model.cancelRun(run);
        }
      }
    });
    commands.addCommand(CommandIDs.stopWorkspace, {
      label: trans.__('Stop the Agents’ Workspace'),
      caption: trans.__('Stop all runs and free the memory; files are kept'),
      describedBy: NO_ARGS,
      isEnabled: () => model.workspace?.state === 'ready',
      execute: () => model.stopWorkspace()
    });
    model.stateChanged.connect(() => commands.notifyCommandChanged());
    for (const command of Object.values(CommandIDs)) {
      palette?.addItem({ command, category, args: { isPalette: true } });
    }
    launcher?.add({
      command: CommandIDs.show,
      category: trans.__('Other'),
      args: { isLauncher: true }
    });
  }
};

const status: JupyterFrontEndPlugin<void> = {
  id: 'jupyter-agents:status',
  description:
    'Says in the status bar how many agents run and what memory they use.',
  autoStart: true,
  requires: [IAgentsModel],
  // Notebook 7 has no status bar.
  optional: [IStatusBar, ITranslator],
  activate: (
    app: JupyterFrontEnd,
    model: AgentsModel,
    statusBar: IStatusBar | null,
    translator: ITranslator | null
  ) => {
    statusBar?.registerStatusItem(status.id, {
      item: statusWidget(
        model,
        (translator ?? nullTranslator).load(DOMAIN),
        () => void app.commands.execute(CommandIDs.show)
      ),
      align: 'left',
      rank: 90
    });
  }
};

const RUN_DEFAULTS: IRunDefaults = {
  model: '',
  permissionMode: 'bypassPermissions',
  maxTurns: null,
  maxBudgetUsd: null
};

const NO_ARGS = { args: { type: 'object', properties: {} } } as const;

export default [model, panel, status];
export { IAgentsModel };
