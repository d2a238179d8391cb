import * as React from 'react';
import { formatBytes } from '../format';
import type { IMemory } from '../tokens';
import { useAgents } from './common';

/** How much of the workspace's memory is used, now and in the last minutes, and by which agent. */
export function Memory(): JSX.Element | null {
  const { model, trans } = useAgents();
  const { workspace } = model;
  if (!workspace) {
    return null;
  }
  const memory = workspace.state === 'ready' ? workspace.memory : null;
  const used = memory?.used_bytes ?? 0;
  const limit = workspace.limits.memory_bytes;
  const level = memory?.level ?? 'ok';
  const words = {
    ok: '',
    warning: trans.__('High: further runs may not fit'),
    critical: trans.__('Critical: processes are about to be killed')
  };
  const figures = trans.__('%1 of %2', formatBytes(used), formatBytes(limit));
  const percent = (bytes: number) => `${Math.min(100, (100 * bytes) / limit)}%`;
  const shares = memory
    ? model.agents.filter(agent => agent.run && memory.runs[agent.run])
    : [];
  const kills = memory?.oom_kills ?? 0;

  return (
    <section
      className="jp-agents-memory"
      data-level={level}
      aria-label={trans.__('Memory')}
    >
      <div className="jp-agents-row">
        <h2>{trans.__('Memory')}</h2>
        <span className="jp-agents-memory-figures">{figures}</span>
      </div>
      <div
        className="jp-agents-bar"
        role="meter"
        aria-label={trans.__('Memory')}
        aria-valuemin={0}
        aria-valuemax={limit}
        aria-valuenow={used}
        aria-valuetext={[figures, words[level]].filter(w => w).join('. ')}
      >
        <div className="jp-agents-bar-fill" style={{ width: percent(used) }} />
        <div
          className="jp-agents-bar-mark"
          title={trans.__(
            'Warning from %1',
            formatBytes(workspace.limits.memory_warning_bytes)
          )}
          style={{ left: percent(workspace.limits.memory_warning_bytes) }}
        />
      </div>
      {words[level] && (
        <div className="jp-agents-memory-level" role="status">
          ⚠ {words[level]}
        </div>
      )}
      <Plot
        samples={model.memory}
        limit={limit}
        warning={workspace.limits.memory_warning_bytes}
      />
      {shares.length > 0 && (
        <ul className="jp-agents-shares" aria-label={trans.__('By agent')}>
          {shares.map(agent => (
            <li key={agent.id}>
              {agent.id} <b>{formatBytes(memory!.runs[agent.run!])}</b>
            </li>
          ))}
        </ul>
      )}
      {kills > 0 && (
        <div className="jp-agents-oom">
          ⚠{' '}
          {trans._n(
            '%1 process was killed since the workspace started, because memory ran out.',
            '%1 processes were killed since the workspace started, because memory ran out.',
            kills
          )}
        </div>
      )}
    </section>
  );
}

/** There also before the first sample, so that what is below it stays where it is. */
function Plot(props: {
  samples: IMemory[];
  limit: number;
  warning: number;
}): JSX.Element {
  const { trans } = useAgents();
  const { samples, limit } = props;
  const start = samples[0]?.time ?? 0;
  const end = samples[samples.length - 1]?.time ?? 0;
  // The first minute fills the plot; then more and more fits into it.
  const minutes = Math.max(1, Math.ceil((end - start) / 60));
  const x = (time: number) =>
    (100 * (1 + (time - end) / (60 * minutes))).toFixed(2);
  const y = (bytes: number) =>
    (100 - Math.min(100, (100 * bytes) / limit)).toFixed(2);
  const points = samples
    .map(({ time, used_bytes }) => `${x(time)},${y(used_bytes)}`)
    .join(' ');
  const uses = samples.map(sample => sample.used_bytes);
  return (
    <svg
      className="jp-agents-plot"
      viewBox="0 0 100 100"
      preserveAspectRatio="none"
      role="img"
      aria-label={
        uses.length > 0
          ? trans._n(
              'Memory in the last minute: between %2 and %3',
              'Memory in the last %1 minutes: between %2 and %3',
              minutes,
              formatBytes(Math.min(...uses)),
              formatBytes(Math.max(...uses))
            )
          : trans.__('Memory has not been measured yet')
      }
    >
      <line
        className="jp-agents-plot-warning"
        x1="0"
        x2="100"
        y1={y(props.warning)}
        y2={y(props.warning)}
      />
      <polygon points={`${x(start)},100 ${points} 100,100`} />
      <polyline points={points} />
    </svg>
  );
}
