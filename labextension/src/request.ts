/** The one way to the server: REST calls and the address of the WebSocket. */
import { URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';
import type { IProblem } from './tokens';

const BASE = 'jupyter-agents';

/** An answer of the API that is not a success; `problem` is fit to be shown. */
export class RequestError extends ServerConnection.ResponseError {
  constructor(
    response: Response,
    readonly problem: IProblem
  ) {
    super(response, problem.message);
  }
}

/** The absolute URL of an API path whose parts are already encoded. */
export function apiUrl(
  settings: ServerConnection.ISettings,
  path: string
): string {
  return URLExt.join(settings.baseUrl, BASE, path);
}

/** An API path from parts that hold anything. */
export function apiPath(...parts: string[]): string {
  return parts
    .flatMap(part => part.split('/'))
    .map(encodeURIComponent)
    .join('/');
}

/**
 * Call the API.
 *
 * @param path - below `jupyter-agents/`, encoded.
 * @param init - as for `fetch`; `json` becomes the body.
 * @returns the response, whose body is not read yet.
 * @throws RequestError when the server says no, `ServerConnection.NetworkError` when there is no server.
 */
export async function request(
  settings: ServerConnection.ISettings,
  path: string,
  { json, ...init }: RequestInit & { json?: unknown } = {}
): Promise<Response> {
  if (json !== undefined) {
    init.body = JSON.stringify(json);
    init.headers = { 'Content-Type': 'application/json' };
  }
  const response = await ServerConnection.makeRequest(
    apiUrl(settings, path),
    init,
    settings
  );
  if (!response.ok) {
    throw new RequestError(response, await problemOf(response));
  }
  return response;
}

/** Call the API and read the JSON of its answer. */
export async function requestJSON<T>(
  ...args: Parameters<typeof request>
): Promise<T> {
  return (await (await request(...args)).json()) as T;
}

/** The URL of the event socket. */
export function socketUrl(settings: ServerConnection.ISettings): string {
  const url = URLExt.join(settings.wsUrl, BASE, 'events');
  return settings.appendToken && settings.token
    ? `${url}?token=${encodeURIComponent(settings.token)}`
    : url;
}

async function problemOf(response: Response): Promise<IProblem> {
  try {
    const body = await response.json();
    if (typeof body?.message === 'string' && body.message) {
      return { reason: '', ...body };
    }
  } catch {
    // A proxy in between answers in HTML.
  }
  return {
    message: `${response.status} ${response.statusText}`.trim(),
    reason: ''
  };
}
