/** Pure: a unified diff as files with their lines. */

export interface IDiffFile {
  name: string;
  added: number;
  removed: number;
  /** Lines with their first character (`+`, `-`, a space or `@`), without the file headers. */
  lines: string[];
}

/** Split the output of `git diff` into files. What comes before the first file is left out. */
export function parseDiff(diff: string): IDiffFile[] {
  const files: IDiffFile[] = [];
  let file: IDiffFile | undefined;
  let inHunk = false;
  for (const line of diff.split('\n')) {
    if (line.startsWith('diff --git ')) {
      file = {
        // Names with unusual characters are quoted; both halves are alike unless the file moved.
        name: line.replace(/^.* "?b\//, '').replace(/"$/, ''),
        added: 0,
        removed: 0,
        lines: []
      };
      files.push(file);
      inHunk = false;
    } else if (file && line.startsWith('@@')) {
      inHunk = true;
      file.lines.push(line);
    } else if (file && inHunk && /^[-+ \\]/.test(line)) {
      file.added += Number(line[0] === '+');
      file.removed += Number(line[0] === '-');
      file.lines.push(line);
    } else if (
      file &&
      /^(Binary files|rename|new file|deleted file|old mode|new mode)/.test(
        line
      )
    ) {
      file.lines.push(`@ ${line}`);
    }
  }
  return files;
}
