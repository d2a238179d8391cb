import { PathExt } from '@jupyterlab/coreutils';
import { Contents, ServerConnection } from '@jupyterlab/services';
import { ISignal, Signal } from '@lumino/signaling';
import { apiPath, apiUrl, request, requestJSON } from './request';
import type { IAgent, IEntry } from './tokens';

/**
 * The agents' files as a drive of JupyterLab, so that its file browser and editors work on them.
 *
 * Paths are `agents:<agent>/<file>`. The root has one folder for each agent; agents are created and removed in the
 * panel only.
 */
export class AgentsDrive implements Contents.IDrive {
  constructor(readonly serverSettings: ServerConnection.ISettings) {}

  readonly name = 'agents';

  get fileChanged(): ISignal<this, Contents.IChangedArgs> {
    return this._fileChanged;
  }

  get isDisposed(): boolean {
    return this._isDisposed;
  }

  dispose(): void {
    this._isDisposed = true;
    Signal.clearData(this);
  }

  async get(
    path: string,
    options: Contents.IFetchOptions = {}
  ): Promise<Contents.IModel> {
    const model = await this._stat(path);
    if (options.content === false) {
      return model;
    }
    if (model.type === 'directory') {
      const content = path ? await this._list(path) : await this._agents();
      return { ...model, format: 'json', content };
    }
    const response = await this._request(path);
    const bytes = new Uint8Array(await response.arrayBuffer());
    return { ...model, ...decode(path, bytes, options) };
  }

  async save(
    path: string,
    options: Partial<Contents.IModel> = {}
  ): Promise<Contents.IModel> {
    if (options.type === 'directory') {
      return this._put(path, null);
    }
    const bytes = encode(options);
    if (options.chunk === undefined) {
      return this._put(path, new Blob([bytes]));
    }
    // JupyterLab uploads large files in pieces, the last of which has number -1; ours appear whole or not at all.
    const pieces = options.chunk === 1 ? [] : (this._pieces.get(path) ?? []);
    pieces.push(bytes);
    if (options.chunk !== -1) {
      this._pieces.set(path, pieces);
      return toModel(path, 'file');
    }
    this._pieces.delete(path);
    return this._put(path, new Blob(pieces));
  }

  /** Store a file under a path such as `<agent>/data.csv`, replacing what is there. */
  async upload(path: string, data: Blob): Promise<void> {
    await this._put(path, data);
  }

  async newUntitled(
    options: Contents.ICreateOptions = {}
  ): Promise<Contents.IModel> {
    const folder = options.path ?? '';
    if (options.type === 'directory') {
      return this._put(await this._free(folder, 'Untitled Folder', ''), null);
    }
    const notebook = options.type === 'notebook';
    const name = notebook ? 'Untitled' : 'untitled';
    const ext = notebook ? '.ipynb' : (options.ext ?? '');
    const content = notebook
      ? '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
      : '';
    return this._put(await this._free(folder, name, ext), new Blob([content]));
  }

  async delete(path: string): Promise<void> {
    await this._request(path, { method: 'DELETE' });
    this._changed('delete', toModel(path, 'file'), null);
  }

  async rename(path: string, newPath: string): Promise<Contents.IModel> {
    const [agent] = split(path);
    const [newAgent, to] = split(newPath);
    if (agent !== newAgent || !to) {
      throw new Error("A file can't be moved out of its agent; copy it.");
    }
    const response = await this._request(path, {
      method: 'PATCH',
      json: { path: to }
    });
    const model = fromEntry(agent, (await response.json()) as IEntry);
    this._changed('rename', toModel(path, model.type), model);
    return model;
  }

  async copy(path: string, toFolder: string): Promise<Contents.IModel> {
    const data = await (await this._request(path)).blob();
    const ext = PathExt.extname(path);
    const name = PathExt.basename(path, ext);
    const taken = new Set((await this._list(toFolder)).map(file => file.name));
    const target = taken.has(name + ext)
      ? await this._free(toFolder, `${name}-Copy`, ext)
      : PathExt.join(toFolder, name + ext);
    return this._put(target, data);
  }

  async getDownloadUrl(path: string): Promise<string> {
    return apiUrl(this.serverSettings, filePath(path));
  }

  // There are no checkpoints, but JupyterLab makes one with each save.
  async createCheckpoint(): Promise<Contents.ICheckpointModel> {
    return { id: '', last_modified: new Date().toISOString() };
  }

  async listCheckpoints(): Promise<Contents.ICheckpointModel[]> {
    return [];
  }

  async restoreCheckpoint(): Promise<void> {
    throw new Error('Files of agents have no checkpoints.');
  }

  async deleteCheckpoint(): Promise<void> {
    // There is none.
  }

  /** What is known of a path without reading it. */
  private async _stat(path: string): Promise<Contents.IModel> {
    const [agent, file] = split(path);
    if (!agent || !file) {
      return toModel(path, 'directory');
    }
    const found = (await this._list(PathExt.dirname(path))).find(
      entry => entry.name === PathExt.basename(path)
    );
    if (!found) {
      throw new ServerConnection.ResponseError(
        new Response(null, { status: 404 }),
        `No such file: ${path}`
      );
    }
    return found;
  }

  private async _agents(): Promise<Contents.IModel[]> {
    const agents = await requestJSON<IAgent[]>(this.serverSettings, 'agents');
    return agents.map(agent => toModel(agent.id, 'directory'));
  }

  private async _list(path: string): Promise<Contents.IModel[]> {
    const entries = (await (await this._request(path)).json()) as IEntry[];
    return entries.map(entry => fromEntry(split(path)[0], entry));
  }

  /** Store a file, or make a folder when there is no data. */
  private async _put(
    path: string,
    data: Blob | null
  ): Promise<Contents.IModel> {
    const query = data ? '' : '?type=directory';
    const response = await this._request(
      path,
      { method: 'PUT', body: data ?? '' },
      query
    );
    const entry = (await response.json()) as IEntry;
    const model = fromEntry(split(path)[0], entry);
    this._changed(data ? 'save' : 'new', null, model);
    return model;
  }

  /** A path in a folder that nothing has yet. */
  private async _free(
    folder: string,
    name: string,
    ext: string
  ): Promise<string> {
    const taken = new Set((await this._list(folder)).map(file => file.name));
    let free = name + ext;
    for (let n = 1; taken.has(free); n++) {
      free = `${name}${n}${ext}`;
    }
    return PathExt.join(folder, free);
  }

  private async _request(
    path: string,
    init: Parameters<typeof request>[2] = {},
    query = ''
  ): Promise<Response> {
    const [agent, file] = split(path);
    if (!agent || (!file && init.method)) {
      throw new Error('Agents are created and removed in the Agents panel.');
    }
    return request(this.serverSettings, filePath(path) + query, init);
  }

  private _changed(
    type: Contents.IChangedArgs['type'],
    oldValue: Contents.IModel | null,
    newValue: Contents.IModel | null
  ): void {
    this._fileChanged.emit({ type, oldValue, newValue });
  }

  private _pieces = new Map<string, Uint8Array[]>();
  private _isDisposed = false;
  private _fileChanged = new Signal<this, Contents.IChangedArgs>(this);
}

function split(path: string): [agent: string, file: string] {
  const [agent, ...rest] = path.split('/').filter(part => part);
  return [agent ?? '', rest.join('/')];
}

function filePath(path: string): string {
  const [agent, file] = split(path);
  return apiPath('agents', agent, 'files', file);
}

function fromEntry(agent: string, entry: IEntry): Contents.IModel {
  return {
    ...toModel(
      `${agent}/${entry.path}`,
      entry.type === 'directory' ? 'directory' : 'file'
    ),
    size: entry.size,
    last_modified: new Date(entry.modified * 1000).toISOString()
  };
}

function toModel(path: string, type: string): Contents.IModel {
  const time = new Date(0).toISOString();
  return {
    name: PathExt.basename(path),
    path,
    type: type === 'file' && path.endsWith('.ipynb') ? 'notebook' : type,
    writable: true,
    created: time,
    last_modified: time,
    mimetype: '',
    content: null,
    format: null
  };
}

/** Content in the format that was asked for; without one, text if it is text. */
function decode(
  path: string,
  bytes: Uint8Array,
  { format, type }: Contents.IFetchOptions
): Pick<Contents.IModel, 'format' | 'content'> {
  if (format === 'base64') {
    return { format, content: toBase64(bytes) };
  }
  let text: string;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    if (format || type === 'notebook') {
      throw new Error(`${path} is not UTF-8 encoded text.`);
    }
    return { format: 'base64', content: toBase64(bytes) };
  }
  return format === 'json' || type === 'notebook'
    ? { format: 'json', content: JSON.parse(text) }
    : { format: 'text', content: text };
}

function encode({
  format,
  content
}: Partial<Contents.IModel>): Uint8Array<ArrayBuffer> {
  if (format === 'base64') {
    return Uint8Array.from(atob(content), char => char.charCodeAt(0));
  }
  return new TextEncoder().encode(
    format === 'json' ? JSON.stringify(content, null, 1) : (content ?? '')
  );
}

function toBase64(bytes: Uint8Array): string {
  let binary = '';
  // In pieces, because the arguments of one call are limited.
  for (let at = 0; at < bytes.length; at += 0x8000) {
    binary += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  }
  return btoa(binary);
}
