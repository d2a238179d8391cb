/** Pure text helpers. */
import type { TranslationBundle } from '@jupyterlab/translation';

/** Bytes in the units that the workspace's limit is set in: 1 GB is 1024 MB. */
export function formatBytes(bytes: number): string {
  const trim = (n: number, digits: number) => String(+n.toFixed(digits));
  if (bytes >= 1023.5 * 2 ** 20) {
    return `${trim(bytes / 2 ** 30, 2)} GB`;
  }
  if (bytes >= 2 ** 20) {
    return `${trim(bytes / 2 ** 20, 0)} MB`;
  }
  return bytes >= 1024 ? `${trim(bytes / 1024, 0)} kB` : `${bytes} B`;
}

/** `42 s`, `3 min 5 s`, `2 h 3 min`. */
export function formatDuration(seconds: number): string {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) {
    return `${s} s`;
  }
  if (s < 3600) {
    return `${Math.floor(s / 60)} min ${s % 60} s`;
  }
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

/** Cents matter for a short run, fractions of a cent do not for a long one. */
export function formatCost(usd: number): string {
  return `$${usd.toFixed(usd < 0.1 ? 4 : 2)}`;
}

/** Time of day, with the date when it is not today's. */
export function formatTime(epochSeconds: number): string {
  const date = new Date(epochSeconds * 1000);
  const time = date.toLocaleTimeString([], {
    hour: '2-digit',
    minute: '2-digit'
  });
  return date.toDateString() === new Date().toDateString()
    ? time
    : `${date.toLocaleDateString()} ${time}`;
}

/** Text without terminal escape sequences and control characters, other than tab and line end. */
export function plain(text: string): string {
  return (
    text
      // Window titles and links (OSC … BEL or ST), then colours and cursor moves (CSI), then short escapes.

      .replace(/\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?/g, '')

      .replace(/(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?/g, '')

      .replace(/\x1b[ -/]*[0-~]?/g, '')
      .replace(/\r\n?/g, '\n')

      .replace(/[\x00-\x08\x0b-\x1f\x7f-\x9f]/g, '')
  );
}

/** The first line of a text, at most `length` characters of it. */
export function firstLine(text: string, length = 80): string {
  const line = text
    .slice(0, 4 * length)
    .trim()
    .split('\n', 1)[0];
  return line.length > length ? `${line.slice(0, length - 1)}…` : line;
}

/** Why `id` can't name a new agent, or an empty string. */
export function agentIdError(
  id: string,
  taken: string[],
  trans: TranslationBundle
): string {
  if (!/^[a-z0-9-]*$/.test(id)) {
    return trans.__('Use lower-case letters, digits and hyphens only.');
  }
  if (id.startsWith('-')) {
    return trans.__('Begin with a letter or a digit.');
  }
  if (id.length > 32) {
    return trans.__('Use at most 32 characters.');
  }
  return taken.includes(id)
    ? trans.__('An agent named %1 exists already.', id)
    : '';
}

/** Why `name` can't name an environment variable, or an empty string. */
export function envNameError(name: string, trans: TranslationBundle): string {
  return name === '' || /^[A-Za-z_][A-Za-z0-9_]{0,127}$/.test(name)
    ? ''
    : trans.__(
        'Use letters, digits and underscores, beginning with a letter or underscore.'
      );
}
