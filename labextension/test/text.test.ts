import { nullTranslator } from '@jupyterlab/translation';
import { describe, expect, it } from 'vitest';
import { parseDiff } from '../src/diff';
import {
  agentIdError,
  envNameError,
  firstLine,
  formatBytes,
  formatDuration,
  plain
} from '../src/format';
import { isRemote } from '../src/untrusted';

const trans = nullTranslator.load('jupyter_agents');

describe('parseDiff', () => {
  it('counts lines of each file, and none of its headers', () => {
    const diff = [
      'diff --git a/a.txt b/a.txt',
      'index 1..2 100644',
      '--- a/a.txt',
      '+++ b/a.txt',
      '@@ -1,2 +1,2 @@',
      ' same',
      '-old',
      '--- looks like a header',
      '+new',
      'diff --git a/b.png b/b.png',
      'new file mode 100644',
      'Binary files /dev/null and b/b.png differ',
      ''
    ].join('\n');
    expect(parseDiff(diff)).toEqual([
      {
        name: 'a.txt',
        added: 1,
        removed: 2,
        lines: [
          '@@ -1,2 +1,2 @@',
          ' same',
          '-old',
          '--- looks like a header',
          '+new'
        ]
      },
      {
        name: 'b.png',
        added: 0,
        removed: 0,
        lines: [
          '@ new file mode 100644',
          '@ Binary files /dev/null and b/b.png differ'
        ]
      }
    ]);
  });

  it('makes nothing of nothing', () => {
    expect(parseDiff('')).toEqual([]);
  });
});

describe('text', () => {
  it('formats sizes as the limit is set', () => {
    expect(formatBytes(2 ** 30)).toBe('1 GB');
    expect(formatBytes(800 * 2 ** 20)).toBe('800 MB');
    expect(formatBytes(5)).toBe('5 B');
  });

  it('formats durations', () => {
    expect(formatDuration(42)).toBe('42 s');
    expect(formatDuration(185)).toBe('3 min 5 s');
    expect(formatDuration(-1)).toBe('0 s');
  });

  it('keeps text and drops what steers a terminal', () => {
    expect(plain('a\tb\r\nc\x00\x1b[2Jd\x9b1me')).toBe('a\tb\nc' + 'de');
    expect(firstLine('\n  first \nsecond')).toBe('first ');
    expect(firstLine('x'.repeat(100), 10)).toHaveLength(10);
  });

  it('says why a name will not do', () => {
    expect(agentIdError('data-1', [], trans)).toBe('');
    for (const id of ['Data', '../x', '-x', 'x'.repeat(33), 'taken', 'é']) {
      expect(agentIdError(id, ['taken'], trans)).not.toBe('');
    }
    expect(envNameError('API_KEY', trans)).toBe('');
    expect(envNameError('1A', trans)).not.toBe('');
  });
});

describe('isRemote', () => {
  it('tells what would be fetched from elsewhere', () => {
    for (const url of [
      'https://a.example/p?q=secret',
      '//a.example/p',
      '/\\a.example/p',
      ' h\nttps://a.example',
      'data:text/html,x',
      'blob:x'
    ]) {
      expect(isRemote(url)).toBe(true);
    }
    for (const url of ['plot.png', '/plot.png', './a:b', 'data:image/png,x']) {
      expect(isRemote(url)).toBe(false);
    }
  });
});
