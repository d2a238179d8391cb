import { ServerConnection } from '@jupyterlab/services';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { AgentsModel } from '../src/model';
import type { IAgent, IRun, IWorkspace, Message } from '../src/tokens';

/** A socket that the test holds the other end of. */
class FakeSocket {
  static last: FakeSocket;
  static count = 0;
  readonly sent: Record<string, unknown>[] = [];
  onopen?: () => void;
  onmessage?: (event: { data: string }) => void;
  onclose?: () => void;
  constructor(readonly url: string) {
    FakeSocket.last = this;
    FakeSocket.count++;
  }
  send(text: string) {
    this.sent.push(JSON.parse(text));
  }
  close() {
    this.onclose?.();
  }
  push(message: Message) {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
}

const workspace: IWorkspace = {
  name: 'workspace-x',
  user: 'x',
  state: 'ready',
  limits: {
    memory_bytes: 2 ** 30,
    memory_warning_bytes: 800 * 2 ** 20,
    cpu: 1,
    agents: 10,
    runs: 3
  },
  memory: null,
  agents: 1,
  active_runs: 0,
  started: 1,
  image: 'standard',
  images: ['standard'],
  problem: null
};

const run = (state: IRun['state'] = 'running'): IRun => ({
  id: 'r1',
  agent: 'a',
  state,
  prompt: 'p',
  model: null,
  continued: false,
  started: 1,
  ended: null,
  activity: null,
  result: null,
  error: null,
  oom_kills: 0,
  peak_bytes: null
});

const agent = (last: IRun | null = null): IAgent => ({
  id: 'a',
  state: last?.state === 'running' ? 'running' : 'idle',
  run: last?.state === 'running' ? last.id : null,
  activity: null,
  last_run: last,
  has_session: false,
  created: 1
});

const text = (text: string) => ({
  type: 'assistant',
  message: { content: [{ type: 'text', text }] }
});

describe('AgentsModel', () => {
  let model: AgentsModel;

  beforeEach(() => {
    vi.useFakeTimers();
    FakeSocket.count = 0;
    model = new AgentsModel(
      ServerConnection.makeSettings({
        baseUrl: 'http://localhost/',
        wsUrl: 'ws://localhost/',
        WebSocket: FakeSocket as unknown as typeof WebSocket,
        fetch: async () => new Response('[]')
      })
    );
    model.connect();
    FakeSocket.last.onopen?.();
  });

  afterEach(() => {
    model.dispose();
    vi.useRealTimers();
  });

  const open = (last: IRun | null) =>
    FakeSocket.last.push({ type: 'state', workspace, agents: [agent(last)] });

  it('shows the newest run of the first agent and asks for its events', () => {
    open(run());
    expect(model.selected?.id).toBe('a');
    expect(FakeSocket.last.sent).toContainEqual({ subscribe: 'r1', since: 0 });
  });

  it('goes on after a lost connection where the transcript stopped', () => {
    open(run());
    const events = [text('one'), text('two')];
    FakeSocket.last.push({ type: 'events', run: 'r1', since: 0, events });
    FakeSocket.last.close();
    expect(model.connection).toBe('lost');
    vi.advanceTimersByTime(1000);
    expect(FakeSocket.count).toBe(2);
    FakeSocket.last.onopen?.();
    expect(FakeSocket.last.sent).toEqual([{ subscribe: 'r1', since: 2 }]);
    expect(model.transcript?.items).toHaveLength(2);
  });

  it('asks for the events again when the workspace is back', () => {
    open(run());
    const message = "Docker doesn't answer.";
    const error = { message, reason: 'engine_unavailable' };
    const away: IWorkspace = { ...workspace, state: 'unavailable' };
    FakeSocket.last.push({ type: 'error', run: 'r1', ...error });
    FakeSocket.last.push({ type: 'state', workspace: away, agents: [agent()] });
    expect(model.transcript?.problem).toBe(message);
    FakeSocket.last.sent.length = 0;
    open(run());
    expect(model.transcript?.problem).toBe('');
    expect(FakeSocket.last.sent).toEqual([{ subscribe: 'r1', since: 0 }]);
    open(run());
    expect(FakeSocket.last.sent).toHaveLength(1);
  });

  it('waits longer after each attempt that fails', () => {
    const waits = [];
    for (let n = 0; n < 4; n++) {
      FakeSocket.last.close();
      waits.push(model.retryAt - Date.now());
      vi.advanceTimersByTime(waits[n] + 1);
    }
    expect(waits[3]).toBeGreaterThan(2 * waits[0]);
    expect(FakeSocket.count).toBe(5);
  });

  it('asks again for events that are missing in between', () => {
    open(run());
    FakeSocket.last.push({ type: 'events', run: 'r1', since: 5, events: [{}] });
    expect(FakeSocket.last.sent.at(-1)).toEqual({ subscribe: 'r1', since: 0 });
    expect(model.transcript?.next).toBe(0);
  });

  it('tells once that a run has ended', () => {
    const ended: string[] = [];
    model.runEnded.connect((_, run) => ended.push(run.state));
    open(run());
    FakeSocket.last.push({ type: 'run', run: run('succeeded') });
    open(run('succeeded'));
    expect(ended).toEqual(['succeeded']);
  });

  it('asks for nothing more once a transcript is complete', () => {
    open(run());
    FakeSocket.last.push({ type: 'end', run: 'r1', next: 0 });
    FakeSocket.last.close();
    vi.advanceTimersByTime(1000);
    FakeSocket.last.onopen?.();
    expect(FakeSocket.last.sent).toEqual([]);
  });

  it('keeps the memory samples of the last minutes', () => {
    open(null);
    for (let time = 0; time <= 1000; time += 2) {
      const memory = {
        used_bytes: time,
        limit_bytes: 2 ** 30,
        level: 'ok' as const,
        oom_kills: 0,
        peak_bytes: 0,
        runs: {},
        time
      };
      FakeSocket.last.push({ type: 'memory', memory });
    }
    expect(model.memory.at(-1)?.time).toBe(1000);
    expect(model.memory[0].time).toBeGreaterThanOrEqual(700);
  });

  it('ignores message types that it does not know', () => {
    FakeSocket.last.push({ type: 'tomorrow' } as unknown as Message);
    expect(model.connection).toBe('open');
  });
});
