import * as React from 'react';
import {
  firstLine,
  formatCost,
  formatDuration,
  formatTime,
  plain
} from '../format';
import type { IAgent, IRun } from '../tokens';
import {
  LongText,
  Problem,
  Select,
  stateWord,
  useAgents,
  useNow
} from './common';
import { Prompt } from './prompt';
import { TextActions, TranscriptView } from './transcript';

/** A run of the agent, past or present, and the prompt for the next. */
export function RunView({ agent }: { agent: IAgent }): JSX.Element {
  const { model, trans } = useAgents();
  const run = model.shownRun;
  return (
    <div className="jp-agents-run-view">
      {model.runs.length > 1 && run && (
        <Select
          className="jp-agents-runs"
          aria-label={trans.__('Run')}
          value={run.id}
          onChange={event => model.showRun(event.target.value)}
        >
          {model.runs.map(run => (
            <option key={run.id} value={run.id}>
              {[
                formatTime(run.started),
                stateWord(run.state, trans),
                firstLine(plain(run.prompt), 50)
              ].join(' · ')}
            </option>
          ))}
        </Select>
      )}
      {run ? (
        <TranscriptView
          agent={agent.id}
          running={run.state === 'running'}
          head={
            <div className="jp-agents-user">
              <LongText text={plain(run.prompt)} />
            </div>
          }
          foot={<Outcome run={run} />}
        />
      ) : (
        <p className="jp-agents-empty jp-agents-transcript">
          {trans.__(
            '%1 has a folder of its own and can read, write and run what is in it. Say what it should do; its answer, and each tool it uses, appear here as it works.',
            agent.id
          )}
        </p>
      )}
      <Prompt agent={agent} key={agent.id} />
    </div>
  );
}

/** How the run stands: what it does now, or how it ended and what it cost. */
function Outcome({ run }: { run: IRun }): JSX.Element {
  const { trans } = useAgents();
  const running = run.state === 'running';
  const now = useNow(running);
  const { result } = run;
  const facts = running
    ? [run.activity, formatDuration(now - run.started)]
    : [
        result?.cost_usd != null && formatCost(result.cost_usd),
        result?.input_tokens != null &&
          trans.__(
            '%1 tokens in, %2 out',
            result.input_tokens.toLocaleString(),
            (result.output_tokens ?? 0).toLocaleString()
          ),
        result?.turns != null && trans._n('%1 turn', '%1 turns', result.turns),
        run.ended != null && formatDuration(run.ended - run.started)
      ];
  return (
    <div className="jp-agents-outcome" data-state={run.state}>
      <div className="jp-agents-row">
        <span className="jp-agents-dot" aria-hidden />
        <b role="status">{stateWord(run.state, trans)}</b>
        <span className="jp-agents-facts">
          {facts.filter(fact => fact).join(' · ')}
        </span>
        {result?.text && <TextActions text={result.text} />}
      </div>
      {run.error && <Problem problem={run.error} />}
      {run.oom_kills > 0 && (
        <div className="jp-agents-oom">
          ⚠{' '}
          {trans._n(
            '%1 process was killed during this run, because the workspace’s memory ran out.',
            '%1 processes were killed during this run, because the workspace’s memory ran out.',
            run.oom_kills
          )}
        </div>
      )}
    </div>
  );
}
