import {
  IRenderMime,
  IRenderMimeRegistry,
  RenderMimeRegistry
} from '@jupyterlab/rendermime';
import {
  addBelowIcon,
  codeIcon,
  markdownIcon,
  UseSignal
} from '@jupyterlab/ui-components';
import * as React from 'react';
import { codeIn, Item, IToolItem } from '../transcript';
import { withoutFetching } from '../untrusted';
import {
  CopyButton,
  IconButton,
  LongText,
  useAgents,
  usePieces
} from './common';

/** How many items are drawn at first, and how many more each time one asks. */
const PAGE = 150;

/** How close to its end a transcript counts as being at its end, in pixels. */
const NEAR = 30;

/** The shown run, item by item; it stays at its end while it is at its end. */
export function TranscriptView(props: {
  agent: string;
  running: boolean;
  head: React.ReactNode;
  foot: React.ReactNode;
}): JSX.Element {
  const { model, trans, rendermime, contents } = useAgents();
  const run = model.transcript?.run;
  const [limit, setLimit] = React.useState(PAGE);
  const [atEnd, setAtEnd] = React.useState(true);
  const scroller = React.useRef<HTMLDivElement>(null);
  const content = React.useRef<HTMLDivElement>(null);
  const follow = React.useRef(true);

  React.useEffect(() => {
    follow.current = true;
    setAtEnd(true);
    setLimit(PAGE);
  }, [run]);

  React.useEffect(() => {
    // Markdown is drawn some time after React is done, so what counts is the size.
    const observer = new ResizeObserver(() => {
      if (follow.current) {
        toEnd();
      }
    });
    observer.observe(content.current!);
    observer.observe(scroller.current!);
    return () => observer.disconnect();
  }, []);

  const toEnd = () => {
    scroller.current?.scrollTo({ top: scroller.current.scrollHeight });
  };

  const onScroll = () => {
    const { scrollTop, scrollHeight, clientHeight } = scroller.current!;
    follow.current = scrollHeight - scrollTop - clientHeight < NEAR;
    setAtEnd(follow.current);
  };

  // Links to files open in JupyterLab; all others in a new tab.
  const registry = React.useMemo(
    () =>
      rendermime.clone({
        sanitizer: withoutFetching(rendermime.sanitizer),
        resolver: new RenderMimeRegistry.UrlResolver({
          path: `agents:${props.agent}/_`,
          contents
        })
      }),
    [rendermime, contents, props.agent]
  );

  return (
    <div className="jp-agents-transcript">
      <div
        className="jp-agents-scroller"
        ref={scroller}
        onScroll={onScroll}
        role="log"
        aria-label={trans.__('Transcript')}
        aria-busy={props.running}
        tabIndex={0}
      >
        <div ref={content}>
          {props.head}
          <UseSignal signal={model.transcriptChanged}>
            {() => {
              const items = model.transcript?.items ?? [];
              return (
                <>
                  {items.length > limit && (
                    <button
                      type="button"
                      className="jp-agents-link jp-agents-earlier"
                      onClick={() => {
                        follow.current = false;
                        setLimit(limit + PAGE);
                      }}
                    >
                      {trans.__(
                        'Show earlier (%1 more)',
                        (items.length - limit).toLocaleString()
                      )}
                    </button>
                  )}
                  {items.slice(-limit).map(item => (
                    <ItemView
                      key={`${run} ${item.key}`}
                      item={item}
                      ended={model.transcript?.complete ?? false}
                      rendermime={registry}
                    />
                  ))}
                  {model.transcript?.problem && (
                    <div className="jp-agents-problem" role="alert">
                      {model.transcript.problem}
                    </div>
                  )}
                </>
              );
            }}
          </UseSignal>
          {props.foot}
        </div>
      </div>
      {!atEnd && (
        <button
          type="button"
          className="jp-agents-button jp-agents-to-end"
          onClick={toEnd}
        >
          ↓ {trans.__('Latest')}
        </button>
      )}
    </div>
  );
}

const ItemView = React.memo(function ItemView(props: {
  item: Item;
  ended: boolean;
  rendermime: IRenderMimeRegistry;
}): JSX.Element {
  const { trans } = useAgents();
  const { item } = props;
  const nested = item.nested || undefined;
  switch (item.kind) {
    case 'text':
      return (
        <div className="jp-agents-text" data-nested={nested}>
          <Markdown text={item.text} rendermime={props.rendermime} />
          {!item.partial && <TextActions text={item.text} />}
        </div>
      );
    case 'thinking':
      return (
        <Folded
          className="jp-agents-thinking"
          nested={nested}
          summary={trans.__('Thinking')}
        >
          <LongText text={item.text} />
        </Folded>
      );
    case 'tool':
      return <Tool item={item} ended={props.ended} />;
    case 'error':
      return (
        <div className="jp-agents-problem" role="alert">
          <LongText text={item.text} />
        </div>
      );
    case 'raw':
      return (
        <div className="jp-agents-raw">
          <LongText text={item.text} />
        </div>
      );
  }
});

function Tool(props: { item: IToolItem; ended: boolean }): JSX.Element {
  const { trans } = useAgents();
  const { item } = props;
  const state =
    item.result !== null
      ? item.failed
        ? trans.__('failed')
        : trans.__('done')
      : props.ended
        ? trans.__('no result')
        : trans.__('working');
  return (
    <Folded
      className="jp-agents-tool"
      nested={item.nested || undefined}
      failed={item.failed || undefined}
      summary={
        <>
          <b>{item.name}</b>
          <span className="jp-agents-tool-summary">{item.summary}</span>
          <span className="jp-agents-tool-state">{state}</span>
        </>
      }
    >
      {item.input && <Part label={trans.__('Input')} text={item.input} />}
      {item.result && (
        <Part
          label={item.failed ? trans.__('Error') : trans.__('Result')}
          text={item.result}
        />
      )}
    </Folded>
  );
}

function Part(props: { label: string; text: string }): JSX.Element {
  return (
    <div className="jp-agents-part">
      <div className="jp-agents-row">
        <h3>{props.label}</h3>
        <CopyButton text={props.text} />
      </div>
      <LongText text={props.text} />
    </div>
  );
}

/** A disclosure whose content is drawn only when it is open. */
function Folded(props: {
  className: string;
  nested?: boolean;
  failed?: boolean;
  summary: React.ReactNode;
  children: React.ReactNode;
}): JSX.Element {
  const [open, setOpen] = React.useState(false);
  return (
    <details
      className={props.className}
      data-nested={props.nested}
      data-failed={props.failed}
      onToggle={event => setOpen(event.currentTarget.open)}
    >
      <summary>{props.summary}</summary>
      {open && props.children}
    </details>
  );
}

/** Copy a text, or put it into the notebook that is open. */
export function TextActions({ text }: { text: string }): JSX.Element {
  const { notebooks, trans } = useAgents();
  const code = React.useMemo(() => codeIn(text), [text]);
  const insert = (cell_type: 'code' | 'markdown', source: string) => {
    const notebook = notebooks?.currentWidget?.content;
    if (notebook?.model) {
      const index = notebook.activeCellIndex + 1;
      notebook.model.sharedModel.insertCell(index, { cell_type, source });
      notebook.activeCellIndex = index;
    }
  };
  return (
    <div className="jp-agents-actions">
      <CopyButton text={text} />
      {notebooks && (
        <UseSignal signal={notebooks.currentChanged}>
          {() =>
            notebooks.currentWidget && (
              <>
                <IconButton
                  icon={code ? markdownIcon : addBelowIcon}
                  label={trans.__('Insert as a Markdown cell')}
                  className="jp-agents-insert-markdown"
                  onClick={() => insert('markdown', text)}
                />
                {code && (
                  <IconButton
                    icon={codeIcon}
                    label={trans.__('Insert its code as a cell')}
                    className="jp-agents-insert-code"
                    onClick={() => insert('code', code)}
                  />
                )}
              </>
            )
          }
        </UseSignal>
      )}
    </div>
  );
}

/** Markdown from a model: drawn by JupyterLab as untrusted, so that only harmless HTML is left of it. */
function Markdown(props: {
  text: string;
  rendermime: IRenderMimeRegistry;
}): JSX.Element {
  const { rendermime } = props;
  const [text, more] = usePieces(props.text, 50_000);
  const host = React.useRef<HTMLDivElement>(null);
  const renderer = React.useRef<IRenderMime.IRenderer | null>(null);
  const drawing = React.useRef(false);
  const wanted = React.useRef(text);
  wanted.current = text;

  React.useEffect(() => {
    const created = rendermime.createRenderer('text/markdown');
    renderer.current = created;
    host.current!.replaceChildren(created.node);
    return () => {
      renderer.current = null;
      created.dispose();
    };
  }, [rendermime]);

  React.useEffect(() => {
    const draw = async () => {
      // While one version is drawn others may come, of which only the last counts.
      drawing.current = true;
      try {
        let drawn: string | undefined;
        while (renderer.current && drawn !== wanted.current) {
          drawn = wanted.current;
          await renderer.current.renderModel(
            rendermime.createModel({
              data: { 'text/markdown': drawn },
              trusted: false
            })
          );
        }
      } finally {
        drawing.current = false;
      }
    };
    if (!drawing.current) {
      void draw();
    }
  }, [text, rendermime]);

  return (
    <>
      <div ref={host} />
      {more}
    </>
  );
}
