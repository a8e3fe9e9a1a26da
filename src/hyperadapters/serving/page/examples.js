// Reading of examples that were pasted as CSV or as lines.

import { shortened } from "./elements.js";

const MAX_EXAMPLES = 10000; // the limit of the server
/** Splits CSV as RFC 4180 describes it, and returns records with the number of their first line. */
function splitCsv(source) {
  const records = [];
  let [cells, cell, isQuoted, isClosed, line, start] = [[], "", false, false, 1, 1];
  for (let k = 0; k <= source.length; k++) {
    const sign = source[k]; // undefined at the end
    const isEnd = sign === "\n" || sign === undefined;
    if (isQuoted && sign === undefined) throw new Error(`Line ${start}: a quotation mark is opened and never closed.`);
    if (isQuoted && sign === '"' && source[k + 1] === '"') cell += source[++k];
    else if (isQuoted && sign === '"') [isQuoted, isClosed] = [false, true];
    else if (isQuoted) cell += sign;
    else if (sign === "," || isEnd) {
      cells.push(cell);
      [cell, isClosed] = ["", false];
    } else if (isClosed) throw new Error(`Line ${line}: expected a comma after a closing quotation mark.`);
    else if (sign === '"' && cell === "") isQuoted = true;
    else cell += sign;
    if (sign === "\n") line++;
    if (!isQuoted && isEnd) {
      records.push({ line: start, cells });
      [cells, start] = [[], line];
    }
  }
  return records;
}

const splitLines = (source) => source.split("\n").map((text, k) => ({ line: k + 1, cells: text.split("\t") }));
const ORDERS = {
  comma: { 2: ["text", "label"], 3: ["text", "text_pair", "label"] },
  tab: { 2: ["label", "text"], 3: ["label", "text", "text_pair"] },
};

/** Reads examples, and returns them with the number of examples of each label. */
export function readExamples(pasted, kind) {
  const source = pasted.replace(/^\ufeff/, "").replace(/\r\n?/g, "\n");
  const separator = source.trimStart().split("\n")[0].includes("\t") ? "tab" : "comma";
  const isFilled = ({ cells }) => cells.some((cell) => cell.trim() !== "");
  const records = (separator === "tab" ? splitLines : splitCsv)(source).filter(isFilled);
  if (!records.length) return { examples: [], labels: new Map() };
  const header = records[0].cells.map((cell) => cell.trim().toLowerCase());
  const hasHeader = header.includes("text") && header.includes("label");
  const columns = hasHeader ? header : ORDERS[separator][header.length];
  if (!columns) throw new Error(`Line ${records[0].line}: expected 2 or 3 columns, found ${header.length}.`);
  const examples = records.slice(hasHeader ? 1 : 0).map((record) => readExample(record, columns, kind));
  return { examples, labels: countLabels(examples, kind) };
}

function readExample({ line, cells }, columns, kind) {
  if (cells.length !== columns.length) {
    const hint = cells.length > columns.length ? " A text with a comma has to be in quotation marks." : "";
    throw new Error(`Line ${line}: expected ${columns.length} columns, found ${cells.length}.${hint}`);
  }
  const value = (column) => cells[columns.indexOf(column)]?.trim() ?? "";
  for (const column of kind === "multi-label" ? ["text"] : ["text", "label"]) {
    if (!value(column)) throw new Error(`Line ${line}: the ${column} is empty.`);
  }
  const label = readLabel(value("label"), kind);
  if (Number.isNaN(label)) throw new Error(`Line ${line}: expected a number, found ${shortened(value("label"), 40)}.`);
  return { text: value("text"), ...(value("text_pair") && { text_pair: value("text_pair") }), label };
}

function readLabel(cell, kind) {
  if (kind === "multi-label") return cell.split(";").map((label) => label.trim()).filter((label) => label !== "");
  return kind === "regression" ? Number(cell) : cell;
}

function countLabels(examples, kind) {
  const labels = new Map();
  for (const label of examples.flatMap((example) => example.label)) labels.set(label, (labels.get(label) ?? 0) + 1);
  const found = examples.length;
  if (found > MAX_EXAMPLES) throw new Error(`Expected at most ${MAX_EXAMPLES} examples, found ${found}.`);
  if (kind === "classification" && labels.size === 1) throw new Error("Expected two labels or more, found one.");
  return labels;
}
