import { describe, expect, it } from 'vitest';
import { codeIn, Transcript } from '../src/transcript';

const delta = (text: string) => ({
  type: 'stream_event',
  event: { type: 'content_block_delta', delta: { type: 'text_delta', text } }
});
const said = (...content: unknown[]) => ({
  type: 'assistant',
  message: { content }
});

function read(...events: unknown[]) {
  const transcript = new Transcript('r');
  transcript.add(0, events);
  return transcript;
}

describe('Transcript', () => {
  it('puts the whole text in the place of its parts', () => {
    const transcript = read(delta('Hel'), delta('lo'));
    expect(transcript.items).toMatchObject([
      { kind: 'text', text: 'Hello', partial: true }
    ]);
    transcript.add(2, [said({ type: 'text', text: 'Hello.' })]);
    expect(transcript.items).toMatchObject([
      { kind: 'text', text: 'Hello.', partial: false }
    ]);
  });

  it('joins a tool call and its result', () => {
    const { items } = read(
      said({
        type: 'tool_use',
        id: 't1',
        name: 'Bash',
        input: { description: 'List', command: 'ls -la\n# more' }
      }),
      {
        type: 'user',
        message: {
          content: [
            {
              type: 'tool_result',
              tool_use_id: 't1',
              content: [{ type: 'text', text: 'a.txt' }],
              is_error: true
            }
          ]
        }
      }
    );
    expect(items).toMatchObject([
      {
        kind: 'tool',
        name: 'Bash',
        summary: 'ls -la',
        result: 'a.txt',
        failed: true
      }
    ]);
  });

  it('refuses events after a gap, and takes repeated ones once', () => {
    const transcript = read(said({ type: 'text', text: 'one' }));
    expect(transcript.add(2, [said({ type: 'text', text: 'no' })])).toBe(false);
    expect(transcript.next).toBe(1);
    const again = [
      said({ type: 'text', text: 'one' }),
      said({ type: 'text', text: 'two' })
    ];
    expect(transcript.add(0, again)).toBe(true);
    expect(transcript.items.map(item => 'text' in item && item.text)).toEqual([
      'one',
      'two'
    ]);
  });

  it('shows an error that the run closes with, but no answer twice', () => {
    const result = { type: 'result', result: 'done' };
    expect(
      read(said({ type: 'text', text: 'done' }), result).items
    ).toHaveLength(1);
    expect(read({ ...result, is_error: true }).items).toMatchObject([
      { kind: 'error', text: 'done' }
    ]);
  });

  it('survives whatever a log may hold', () => {
    const odd = [
      null,
      7,
      'x',
      [],
      {},
      { type: 'assistant' },
      { type: 'assistant', message: { content: [null, 3, { type: 'new' }] } },
      { type: 'user', message: { content: [{ type: 'tool_result' }] } },
      { type: 'stream_event', event: { type: 'content_block_delta' } },
      { type: 'result', result: { deep: [] } },
      { type: 'tomorrow' }
    ];
    const transcript = read(...odd);
    expect(transcript.items).toEqual([]);
    expect(transcript.next).toBe(odd.length);
  });

  it('strips terminal escapes', () => {
    const { items } = read(
      said({ type: 'text', text: '\x1b[31mred\x1b[0m\x1b]0;title\x07!' })
    );
    expect(items).toMatchObject([{ text: 'red!' }]);
  });

  it('takes 10,000 parts in no time', () => {
    const events = Array.from({ length: 10_000 }, (_, n) => delta(`${n} `));
    const before = performance.now();
    expect(read(...events).items).toHaveLength(1);
    expect(performance.now() - before).toBeLessThan(2000);
  });
});

describe('codeIn', () => {
  it('gives the code of all blocks', () => {
    expect(codeIn('a\n```python\nx = 1\n```\nb\n~~~\ny\n~~~\n')).toBe(
      'x = 1\n\ny'
    );
    expect(codeIn('no code')).toBe('');
  });
});
