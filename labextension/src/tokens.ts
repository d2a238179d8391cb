/** What the API says (openapi.yaml, docs/api.md), and the tokens of this extension. Nothing here runs. */
import { Token } from '@lumino/coreutils';
import type { AgentsModel } from './model';

export interface IProblem {
  message: string;
  reason: string;
  command?: string;
}

export interface ILimits {
  memory_bytes: number;
  memory_warning_bytes: number;
  cpu: number;
  agents: number;
  runs: number;
}

export interface IMemory {
  used_bytes: number;
  limit_bytes: number;
  level: 'ok' | 'warning' | 'critical';
  oom_kills: number;
  peak_bytes: number;
  /** Bytes of each active run, by run id. */
  runs: Record<string, number>;
  time: number;
}

export interface IWorkspace {
  name: string;
  user: string;
  state: 'stopped' | 'starting' | 'ready' | 'unavailable';
  limits: ILimits;
  memory: IMemory | null;
  agents: number | null;
  active_runs: number;
  started: number | null;
  /** Of the running container. */
  image: string | null;
  /** What may be chosen, the default first. */
  images: string[];
  problem: IProblem | null;
}

export interface IResult {
  text: string;
  cost_usd: number | null;
  input_tokens: number | null;
  output_tokens: number | null;
  turns: number | null;
  duration: number | null;
  session_id: string | null;
}

export interface IRun {
  id: string;
  agent: string;
  state:
    | 'running'
    | 'succeeded'
    | 'failed'
    | 'cancelled'
    | 'timed_out'
    | 'oom_killed'
    | 'lost';
  prompt: string;
  model: string | null;
  continued: boolean;
  started: number;
  ended: number | null;
  activity: string | null;
  result: IResult | null;
  error: IProblem | null;
  oom_kills: number;
  peak_bytes: number | null;
}

export interface IAgent {
  id: string;
  state: 'idle' | 'running';
  run: string | null;
  activity: string | null;
  last_run: IRun | null;
  has_session: boolean;
  created: number;
}

export interface IEntry {
  name: string;
  /** Relative to the agent's directory. */
  path: string;
  type: 'file' | 'directory' | 'symlink' | 'other';
  size: number;
  modified: number;
}

export interface IRunRequest {
  prompt: string;
  model?: string;
  continue?: boolean;
  max_turns?: number;
  max_budget_usd?: number;
  permission_mode?: string;
}

/** A message that the server pushes on the WebSocket. */
export type Message =
  | { type: 'state'; workspace: IWorkspace; agents: IAgent[] }
  | { type: 'memory' | 'warning'; memory: IMemory }
  | { type: 'run'; run: IRun }
  | { type: 'events'; run: string; since: number; events: unknown[] }
  | { type: 'end'; run: string; next: number }
  | { type: 'error'; message: string; reason: string; run?: string };

/** How the panel fills in a new run until the user changes it. */
export interface IRunDefaults {
  model: string;
  permissionMode: string;
  maxTurns: number | null;
  maxBudgetUsd: number | null;
}

export const PERMISSION_MODES = [
  'bypassPermissions',
  'acceptEdits',
  'auto',
  'default',
  'dontAsk',
  'plan'
];

/** Gives other extensions the same model that the side panel shows. */
export const IAgentsModel = new Token<AgentsModel>(
  'jupyter-agents:IAgentsModel',
  'The agents of the user: their state, runs and files.'
);

/** Scripts and tests find the commands under these names. */
export namespace CommandIDs {
  export const show = 'jupyter-agents:show';
  export const create = 'jupyter-agents:create';
  export const run = 'jupyter-agents:run';
  export const stop = 'jupyter-agents:stop';
  export const stopWorkspace = 'jupyter-agents:stop-workspace';
}
