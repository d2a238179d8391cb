import type { IRenderMime } from '@jupyterlab/rendermime';

/**
 * A sanitiser that leaves nothing which the browser would fetch by itself from elsewhere.
 *
 * The address of a picture can carry what an agent has read to whoever wrote it into a web page, past a workspace
 * without network: so pictures from elsewhere become links. Pictures among the agent's files stay.
 */
export function withoutFetching(
  sanitizer: IRenderMime.ISanitizer
): IRenderMime.ISanitizer {
  return Object.assign(Object.create(sanitizer) as IRenderMime.ISanitizer, {
    sanitize: (...args: Parameters<IRenderMime.ISanitizer['sanitize']>) => {
      // A parsed document fetches nothing before it is shown.
      const { body } = new DOMParser().parseFromString(
        sanitizer.sanitize(...args),
        'text/html'
      );
      for (const name of ['srcset', 'poster', 'background']) {
        for (const node of body.querySelectorAll(`[${name}]`)) {
          node.removeAttribute(name);
        }
      }
      for (const node of body.querySelectorAll('[src]')) {
        const url = node.getAttribute('src') ?? '';
        if (isRemote(url)) {
          const link = body.ownerDocument.createElement('a');
          link.textContent = node.getAttribute('alt') || url;
          // Any other scheme is as good as none.
          if (/^https?:/i.test(url)) {
            link.href = url;
          }
          node.replaceWith(link);
        }
      }
      return body.innerHTML;
    }
  });
}

/** Whether a URL leads away from the agent's files. */
export function isRemote(url: string): boolean {
  // Browsers leave out white space and control characters, and take a backslash for a slash.

  const clean = url.replace(/[\x00-\x20]/g, '');
  return (
    /^([a-z][a-z0-9+.-]*:|[\\/]{2})/i.test(clean) &&
    !/^data:image\//i.test(clean)
  );
}
