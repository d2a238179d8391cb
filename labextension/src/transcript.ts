/**
 * From a run's events to what is shown.
 *
 * Claude Code adds event types with every release, and what an event holds is written by a model: so nothing is taken
 * for granted here, and what is not understood is left out.
 */
import { firstLine, plain } from './format';

interface IItemBase {
  /** Stays the same while the item grows. */
  readonly key: number;
  /** Whether a subagent did it. */
  readonly nested: boolean;
}

export interface ITextItem extends IItemBase {
  readonly kind: 'text' | 'thinking';
  readonly text: string;
  /** Whether more text may follow. */
  readonly partial: boolean;
}

export interface IToolItem extends IItemBase {
  readonly kind: 'tool';
  readonly id: string;
  readonly name: string;
  /** One line that says what the call does, e.g. a command. */
  readonly summary: string;
  readonly input: string;
  /** Null while the tool works. */
  readonly result: string | null;
  readonly failed: boolean;
}

export interface INoteItem extends IItemBase {
  /** `error`: the run's own error. `raw`: log output that is not an event. */
  readonly kind: 'error' | 'raw';
  readonly text: string;
}

export type Item = ITextItem | IToolItem | INoteItem;

type Body<T> = T extends unknown ? Omit<T, 'key' | 'nested'> : never;

/** The items of one run, in order. An item that changes is replaced, so that a view can compare by identity. */
export class Transcript {
  constructor(readonly run: string) {}

  readonly items: Item[] = [];

  /** The number of the next event. */
  next = 0;

  /** Whether all events are here. */
  complete = false;

  /** Why events can't be had, or an empty string. */
  problem = '';

  /**
   * Add events, of which the first has number `since`.
   *
   * @returns false if events in between are missing; then nothing was added.
   */
  add(since: number, events: unknown[]): boolean {
    if (since > this.next) {
      return false;
    }
    // After a reconnection some may come twice.
    for (const event of events.slice(this.next - since)) {
      this._event(record(event));
      this.next++;
    }
    return true;
  }

  /** No more events will come. */
  finish(): void {
    this.complete = true;
    this._endPartials();
  }

  private _event(event: Dict): void {
    const parent = string(event.parent_tool_use_id);
    const message = record(event.message);
    switch (event.type) {
      case 'stream_event':
        this._delta(record(event.event), parent);
        break;
      case 'assistant':
        for (const block of list(message.content)) {
          this._block(record(block), parent);
        }
        break;
      case 'user':
        for (const block of list(message.content)) {
          this._result(record(block));
        }
        break;
      case 'result':
        this._endPartials();
        this._final(event);
        break;
      case 'run_end':
        this._endPartials();
        break;
      case 'raw':
        this._push({ kind: 'raw', text: plain(string(event.text)) }, parent);
        break;
      case 'truncated':
        this._push(
          { kind: 'raw', text: `${plain(string(event.text))} …` },
          parent
        );
        break;
    }
  }

  /** A part of a block that is still being written. */
  private _delta(event: Dict, parent: string): void {
    const delta = record(event.delta);
    if (event.type === 'message_start') {
      this._endPartials(parent);
    } else if (delta.type === 'text_delta') {
      this._grow('text', string(delta.text), parent);
    } else if (delta.type === 'thinking_delta') {
      this._grow('thinking', string(delta.thinking), parent);
    }
  }

  private _grow(kind: ITextItem['kind'], text: string, parent: string): void {
    const key = `${kind} ${parent}`;
    const at = this._partials.get(key);
    const item = at === undefined ? undefined : this.items[at];
    if (at !== undefined && item?.kind === kind) {
      this.items[at] = { ...item, text: item.text + plain(text) };
    } else if (text) {
      this._partials.set(key, this.items.length);
      this._push({ kind, text: plain(text), partial: true }, parent);
    }
  }

  /** A complete block; it takes the place of its own parts. */
  private _block(block: Dict, parent: string): void {
    const kind = block.type;
    if (kind === 'text' || kind === 'thinking') {
      const text = plain(string(block[kind]));
      const key = `${kind} ${parent}`;
      const at = this._partials.get(key);
      this._partials.delete(key);
      if (at !== undefined) {
        this.items[at] = {
          ...this.items[at],
          kind,
          text,
          partial: false
        } as ITextItem;
      } else if (text) {
        this._push({ kind, text, partial: false }, parent);
      }
    } else if (kind === 'tool_use' || kind === 'server_tool_use') {
      const input = record(block.input);
      const id = string(block.id);
      this._tools.set(id, this.items.length);
      this._push(
        {
          kind: 'tool',
          id,
          name: firstLine(plain(string(block.name)), 60),
          summary: summaryOf(input),
          input: Object.entries(input)
            .map(([key, value]) => `${key}: ${textOf(value)}`)
            .join('\n'),
          result: null,
          failed: false
        },
        parent
      );
    }
  }

  private _result(block: Dict): void {
    const at = this._tools.get(string(block.tool_use_id));
    const item = at === undefined ? undefined : this.items[at];
    if (at !== undefined && item?.kind === 'tool') {
      const result = list(block.content)
        .map(record)
        .map(part => part.text ?? `[${string(part.type)}]`)
        .map(textOf)
        .join('\n');
      this.items[at] = { ...item, result, failed: block.is_error === true };
    }
  }

  /** The answer or error that the run closes with, unless it is what was said last anyway. */
  private _final(event: Dict): void {
    const text = plain(string(event.result)).trim();
    const said = this.items.some(
      item => item.kind === 'text' && item.text.trim() === text
    );
    if (text && !said) {
      this._push(
        event.is_error === true
          ? { kind: 'error', text }
          : { kind: 'text', text, partial: false },
        ''
      );
    }
  }

  private _endPartials(parent?: string): void {
    for (const [key, at] of this._partials) {
      const item = this.items[at] as ITextItem;
      if (parent === undefined || key === `${item.kind} ${parent}`) {
        this.items[at] = { ...item, partial: false };
        this._partials.delete(key);
      }
    }
  }

  private _push(body: Body<Item>, parent: string): void {
    this.items.push({ ...body, key: this.items.length, nested: !!parent });
  }

  /** Where the text that is being written is, by kind and parent. */
  private _partials = new Map<string, number>();

  /** Where tool calls are, by their id. */
  private _tools = new Map<string, number>();
}

/** The code of the fenced blocks in a Markdown text. */
export function codeIn(markdown: string): string {
  const blocks = markdown.matchAll(/^(`{3,}|~{3,})[^\n]*\n([^]*?)^\1\s*$/gm);
  return Array.from(blocks, match => match[2].trimEnd()).join('\n\n');
}

type Dict = Record<string, unknown>;

function record(value: unknown): Dict {
  return typeof value === 'object' && value !== null ? (value as Dict) : {};
}

function string(value: unknown): string {
  return typeof value === 'string' ? value : '';
}

/** Message content is either text or a list of blocks. */
function list(content: unknown): unknown[] {
  return typeof content === 'string'
    ? [{ type: 'text', text: content }]
    : Array.isArray(content)
      ? content
      : [];
}

function textOf(value: unknown): string {
  return plain(
    typeof value === 'string' ? value : (JSON.stringify(value, null, 2) ?? '')
  );
}

/** The input that tells most about a call, whatever the tool. */
function summaryOf(input: Dict): string {
  const values = [
    input.command,
    input.file_path,
    input.notebook_path,
    input.pattern,
    input.url,
    input.query,
    input.description,
    ...Object.values(input)
  ];
  const value = values.find(value => typeof value === 'string' && value);
  return firstLine(plain(string(value)), 200);
}
