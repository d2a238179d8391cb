import { ServerConnection } from '@jupyterlab/services';
import type { IDisposable } from '@lumino/disposable';
import { ISignal, Signal } from '@lumino/signaling';
import {
  apiPath,
  request,
  RequestError,
  requestJSON,
  socketUrl
} from './request';
import type {
  IAgent,
  IMemory,
  IProblem,
  IRun,
  IRunRequest,
  IWorkspace,
  Message
} from './tokens';
import { Transcript } from './transcript';

/** Seconds of memory use that are kept for the plot. */
const MEMORY_SECONDS = 300;

/** A transcript is drawn at most this often while it grows, in milliseconds. */
const REDRAW_MS = 100;

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 30_000;

/**
 * The state that every view shows.
 *
 * All of it comes from the server's pushes, so that tabs agree and a reload loses nothing; an action changes nothing
 * here by itself.
 */
export class AgentsModel implements IDisposable {
  constructor(
    readonly serverSettings: ServerConnection.ISettings = ServerConnection.makeSettings()
  ) {}

  /** `idle` until the first `connect()`. */
  connection: 'idle' | 'connecting' | 'open' | 'lost' = 'idle';

  /** Why the connection is lost; null when the server does not answer at all. */
  problem: IProblem | null = null;

  /** When the next attempt to connect is due, as `Date.now()`. */
  retryAt = 0;

  workspace: IWorkspace | null = null;
  agents: IAgent[] = [];

  /** Memory samples of the last minutes, oldest first. */
  memory: IMemory[] = [];

  /** The runs of the selected agent, newest first. */
  runs: IRun[] = [];

  /** The run that is shown. */
  transcript: Transcript | null = null;

  /** What was typed for each agent and not sent yet. */
  readonly drafts = new Map<string, string>();

  /** Something other than the transcript changed. */
  get stateChanged(): ISignal<this, void> {
    return this._stateChanged;
  }

  /** The transcript grew or is another one. */
  get transcriptChanged(): ISignal<this, void> {
    return this._transcriptChanged;
  }

  /** A run that was seen running has ended. */
  get runEnded(): ISignal<this, IRun> {
    return this._runEnded;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  dispose(): void {
    this._isDisposed = true;
    clearTimeout(this._retryTimer);
    clearTimeout(this._redrawTimer);
    this._socket?.close();
    Signal.clearData(this);
  }

  /** The agent that is shown in detail. */
  get selected(): IAgent | null {
    return this.agents.find(agent => agent.id === this._selected) ?? null;
  }

  /** The run that is shown. */
  get shownRun(): IRun | null {
    return this.runs.find(run => run.id === this.transcript?.run) ?? null;
  }

  /** Look at the workspace without starting it, and connect if it has active runs. */
  async peek(): Promise<void> {
    this.workspace = await requestJSON<IWorkspace>(
      this.serverSettings,
      'workspace'
    );
    this._stateChanged.emit();
    if (this.workspace.active_runs > 0) {
      this.connect();
    }
  }

  /** Connect, which starts the workspace, and stay connected. Harmless when connected. */
  connect(): void {
    if (this._isDisposed || this._socket) {
      return;
    }
    clearTimeout(this._retryTimer);
    this.connection = this.connection === 'lost' ? 'lost' : 'connecting';
    const socket = new this.serverSettings.WebSocket(
      socketUrl(this.serverSettings)
    );
    this._socket = socket;
    socket.onopen = () => {
      this.connection = 'open';
      this.problem = null;
      this._attempts = 0;
      this._subscribe();
      this._stateChanged.emit();
    };
    socket.onmessage = event => {
      this._onMessage(JSON.parse(event.data) as Message);
    };
    socket.onclose = () => {
      this._socket = null;
      this._runsLoaded = false;
      void this._onLost();
    };
    this._stateChanged.emit();
  }

  /** Show an agent, with its newest run. */
  select(id: string | null): void {
    if (id === this._selected) {
      return;
    }
    this._selected = id;
    this.runs = [];
    this._show(null);
    const agent = this.selected;
    if (agent) {
      this._noteRun(agent.last_run);
      void this._loadRuns(agent.id);
    }
    this._stateChanged.emit();
  }

  /** Show a run of the selected agent. */
  showRun(id: string): void {
    if (this.transcript?.run !== id) {
      this._show(new Transcript(id));
      this._stateChanged.emit();
    }
  }

  async startWorkspace(): Promise<void> {
    await request(this.serverSettings, 'workspace', { method: 'POST' });
  }

  /** Make the workspace anew from another image. */
  async chooseImage(image: string): Promise<void> {
    await request(this.serverSettings, 'workspace', {
      method: 'POST',
      json: { image }
    });
  }

  async stopWorkspace(): Promise<void> {
    await request(this.serverSettings, 'workspace', { method: 'DELETE' });
  }

  /** Create an agent and select it. */
  async createAgent(id: string): Promise<void> {
    const agent = await requestJSON<IAgent>(this.serverSettings, 'agents', {
      method: 'POST',
      json: { id }
    });
    // The push may come later than this answer.
    if (!this.agents.some(other => other.id === id)) {
      this.agents = [...this.agents, agent];
    }
    this.select(id);
  }

  async removeAgent(id: string): Promise<void> {
    await request(this.serverSettings, apiPath('agents', id), {
      method: 'DELETE'
    });
  }

  /** Start a run and show it. */
  async startRun(agent: string, run: IRunRequest): Promise<void> {
    const started = await requestJSON<IRun>(
      this.serverSettings,
      apiPath('agents', agent, 'runs'),
      { method: 'POST', json: run }
    );
    this._noteRun(started);
    // The list of runs may have come meanwhile with this one in it, so that it wasn't new.
    if (agent === this._selected) {
      this.showRun(started.id);
    }
    this._stateChanged.emit();
  }

  /** Cancel a run; returns when it has ended. */
  async cancelRun(id: string): Promise<void> {
    await request(this.serverSettings, apiPath('runs', id), {
      method: 'DELETE'
    });
  }

  /** The names of an agent's environment variables. */
  env(agent: string): Promise<string[]> {
    return requestJSON(this.serverSettings, apiPath('agents', agent, 'env'));
  }

  /** Set a variable, or unset it with null; returns the names. */
  setEnv(agent: string, name: string, value: string | null): Promise<string[]> {
    return requestJSON(this.serverSettings, apiPath('agents', agent, 'env'), {
      method: 'PATCH',
      json: { [name]: value }
    });
  }

  /** What the agent's last run changed, as a unified diff. */
  async diff(agent: string): Promise<string> {
    const path = apiPath('agents', agent, 'diff');
    return (await request(this.serverSettings, path)).text();
  }

  private _onMessage(message: Message): void {
    switch (message.type) {
      case 'state':
        this._onState(message.workspace, message.agents);
        break;
      case 'memory':
      case 'warning':
        this._onMemory(message.memory);
        break;
      case 'run':
        this._noteRun(message.run);
        break;
      case 'events':
        if (
          message.run === this.transcript?.run &&
          !this.transcript.add(message.since, message.events)
        ) {
          this._subscribe();
        }
        return this._redrawSoon();
      case 'end':
        if (message.run === this.transcript?.run) {
          this.transcript.finish();
        }
        return this._redrawSoon();
      case 'error':
        if (this.transcript && message.run === this.transcript.run) {
          this.transcript.problem = message.message;
        }
        return this._redrawSoon();
      default:
        return;
    }
    this._stateChanged.emit();
  }

  private _onState(workspace: IWorkspace, agents: IAgent[]): void {
    const back =
      workspace.state === 'ready' && this.workspace?.state !== 'ready';
    if (back && this.transcript?.problem) {
      this._subscribe();
    }
    this.workspace = workspace;
    this.agents = agents;
    this._onMemory(workspace.memory);
    for (const agent of agents) {
      this._noteRun(agent.last_run);
    }
    // While the workspace is stopped, the list may be empty because it isn't known.
    if (workspace.state === 'ready' && !this.selected) {
      this.select(agents[0]?.id ?? null);
    } else if (this.selected && !this._runsLoaded) {
      void this._loadRuns(this.selected.id);
    }
  }

  private _onMemory(memory: IMemory | null): void {
    if (!this.workspace || !memory) {
      return;
    }
    this.workspace.memory = memory;
    if (memory.time > (this.memory[this.memory.length - 1]?.time ?? 0)) {
      this.memory = this.memory
        .filter(sample => sample.time > memory.time - MEMORY_SECONDS)
        .concat(memory);
    }
  }

  /** Take in what is known of a run. A run that is new for the selected agent is shown. */
  private _noteRun(run: IRun | null): void {
    if (!run) {
      return;
    }
    if (run.state === 'running') {
      this._active.add(run.id);
    } else if (this._active.delete(run.id)) {
      this._runEnded.emit(run);
    }
    if (run.agent !== this._selected) {
      return;
    }
    if (this.runs.some(other => other.id === run.id)) {
      this.runs = this.runs.map(other => (other.id === run.id ? run : other));
    } else {
      this.runs = [run, ...this.runs];
      this.showRun(run.id);
    }
  }

  private async _loadRuns(agent: string): Promise<void> {
    this._runsLoaded = true;
    try {
      const runs = await requestJSON<IRun[]>(
        this.serverSettings,
        `runs?agent=${encodeURIComponent(agent)}`
      );
      if (agent === this._selected) {
        const ids = new Set(runs.map(run => run.id));
        this.runs = [...this.runs.filter(run => !ids.has(run.id)), ...runs];
        this._stateChanged.emit();
      }
    } catch {
      // Only the list of past runs is missing; the next state brings another try.
      this._runsLoaded = false;
    }
  }

  private _show(transcript: Transcript | null): void {
    if (this.transcript && !this.transcript.complete) {
      this._send({ unsubscribe: this.transcript.run });
    }
    this.transcript = transcript;
    this._subscribe();
    this._transcriptChanged.emit();
  }

  /** Ask for the events that the shown transcript lacks. */
  private _subscribe(): void {
    if (this.transcript && !this.transcript.complete) {
      this.transcript.problem = '';
      this._send({
        subscribe: this.transcript.run,
        since: this.transcript.next
      });
    }
  }

  private _send(message: unknown): void {
    if (this.connection === 'open') {
      this._socket?.send(JSON.stringify(message));
    }
  }

  private _redrawSoon(): void {
    this._redrawTimer ??= setTimeout(() => {
      this._redrawTimer = undefined;
      this._transcriptChanged.emit();
    }, REDRAW_MS);
  }

  private async _onLost(): Promise<void> {
    if (this._isDisposed) {
      return;
    }
    this.connection = 'lost';
    const delay = Math.min(
      LAST_RETRY_MS,
      FIRST_RETRY_MS * 2 ** this._attempts++
    );
    // Some spread, so that all tabs of a server that comes back don't come at once.
    const wait = delay * (0.75 + Math.random() / 2);
    this.retryAt = Date.now() + wait;
    this._retryTimer = setTimeout(() => this.connect(), wait);
    this._stateChanged.emit();
    // A refused socket doesn't tell why; a refused request does.
    try {
      this.workspace = await requestJSON<IWorkspace>(
        this.serverSettings,
        'workspace'
      );
      this.problem = null;
    } catch (error) {
      this.problem = error instanceof RequestError ? error.problem : null;
    }
    this._stateChanged.emit();
  }

  private _selected: string | null = null;
  private _runsLoaded = false;
  /** Ids of runs that were seen running and not yet seen ended. */
  private _active = new Set<string>();
  private _socket: WebSocket | null = null;
  private _attempts = 0;
  private _retryTimer: ReturnType<typeof setTimeout> | undefined;
  private _redrawTimer: ReturnType<typeof setTimeout> | undefined;
  private _isDisposed = false;
  private _stateChanged = new Signal<this, void>(this);
  private _transcriptChanged = new Signal<this, void>(this);
  private _runEnded = new Signal<this, IRun>(this);
}
