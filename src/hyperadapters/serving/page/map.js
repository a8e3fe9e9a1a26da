// The map of prototypes, recent inputs and typed texts.

import { counted, shortened, svg } from "./elements.js";

const NUM_COLOURS = 8; // with 7 shapes, 56 tasks look different
/** Returns the corners of a shape of radius 1; every second one is moved inwards for a star. */
function corners(count, degrees, inner = 1) {
  return Array.from({ length: count }, (_, k) => {
    const angle = ((degrees + (360 * k) / count) * Math.PI) / 180;
    const radius = k % 2 ? inner : 1;
    return [radius * Math.cos(angle), radius * Math.sin(angle)];
  });
}

const SHAPES = [
  corners(4, 45),
  corners(3, -90),
  corners(4, 0),
  corners(3, 90),
  corners(10, -90, 0.45),
  [[-0.3, -1], [0.3, -1], [0.3, -0.3], [1, -0.3], [1, 0.3], [0.3, 0.3], [0.3, 1], [-0.3, 1], [-0.3, 0.3], [-1, 0.3],
    [-1, -0.3], [-0.3, -0.3]],
  corners(6, 0),
];

/** Returns the class of the colour of a task. */
export const colour = (index) => `c${Math.max(0, index) % NUM_COLOURS}`;

/** Draws the mark of the task with an index, which has a shape and a colour; a cross if the index is negative. */
export function mark(index, x, y, radius, className) {
  const at = { transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})` };
  const cross = `M${-radius},${-radius}L${radius},${radius}M${-radius},${radius}L${radius},${-radius}`;
  if (index < 0) return svg("path", { ...at, d: cross, class: `${className} none` });
  const points = SHAPES[index % SHAPES.length].map((point) => point.map((value) => (value * radius).toFixed(1)).join());
  return svg("path", { ...at, d: `M${points.join("L")}Z`, class: `${className} ${colour(index)}` });
}

export const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);

/** Scales a vector to length 1. */
export function direction(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}

/** Returns a function from the plane to the image, which shows all points at the same scale in both directions. */
function scaleTo(points, width, height) {
  const [xs, ys] = [points.map((point) => point.x), points.map((point) => point.y)];
  const [left, right, bottom, top] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const scale = Math.min((width - 80) / (right - left || 1), (height - 60) / (top - bottom || 1));
  return ({ x, y }) => [width / 2 + scale * (x - (left + right) / 2), height / 2 - scale * (y - (bottom + top) / 2)];
}

/** Returns the place of a direction on the plane of the map. */
export function project(unit, map) {
  const centred = unit.map((value, k) => value - map.mean[k]);
  const [x, y] = map.axes.map((axis) => dot(axis, centred));
  return { x, y };
}

/** Draws the map with the texts that were typed. Indices of tasks come from a function. */
export function drawPlane(image, map, typed, selected, indexOf) {
  const width = Math.max(200, image.parentElement.clientWidth);
  const height = Math.round(Math.min(440, Math.max(260, 0.7 * width)));
  image.setAttribute("viewBox", `0 0 ${width} ${height}`);
  image.setAttribute("height", height);
  const prototypes = map.prototypes.map(({ task, vector }) => ({ task, ...project(vector, map) }));
  const place = scaleTo([...prototypes, ...map.inputs, ...typed], width, height);
  const drawn = (one, radius, className) => mark(indexOf(one.task), ...place(one), radius, className);
  image.replaceChildren(
    ...map.inputs.map((input) => drawn(input, 3.5, "recent")),
    ...prototypes.map((one) => svg("g", {}, svg("title", {}, one.task), drawn(one, 9, "mark"))),
    ...labels(image, prototypes, typed, place, width, height),
    ...typed.map((point) => numberedCircle(point.index, ...place(point), point.index === selected)),
  );
  const counts = [counted(prototypes.length, "prototype"), counted(map.inputs.length, "recent input")];
  image.setAttribute("aria-label", `Map of ${counts.join(", ")} and ${counted(typed.length, "text")}`);
}

function numberedCircle(index, cx, cy, isSelected) {
  const circle = svg("circle", { cx, cy, r: index < 99 ? 10 : 14 });
  const number = svg("text", { x: cx, y: cy + 4 }, `${index + 1}`);
  return svg("g", { class: isSelected ? "typed selected" : "typed" }, circle, number);
}

/** Writes the names beside the prototypes, where they cover no mark and no other name. */
function labels(image, prototypes, typed, place, width, height) {
  const around = (point, radius) => {
    const [x, y] = place(point);
    return { left: x - radius, right: x + radius, top: y - radius, bottom: y + radius };
  };
  const taken = [...prototypes.map((one) => around(one, 8)), ...typed.map((one) => around(one, 9))];
  const pen = document.createElement("canvas").getContext("2d");
  pen.font = `13px ${getComputedStyle(image).fontFamily}`;
  return prototypes.flatMap((one) => {
    const name = shortened(one.task, 28);
    const box = freeBox(...place(one), pen.measureText(name).width, taken, width, height);
    if (!box && prototypes.length > 30) return []; // a name on a name cannot be read; the bars name all tasks
    const { left, top } = box ?? { left: Math.max(2, place(one)[0] - 60), top: place(one)[1] + 11 };
    return [svg("text", { x: left, y: top + 12 }, name)];
  });
}

function freeBox(x, y, textWidth, taken, width, height) {
  const [beside, middle] = [[x + 12, x - 12 - textWidth], x - textWidth / 2];
  const spots = [[beside[0], y - 8], [beside[1], y - 8], [middle, y - 27], [middle, y + 11]];
  for (const left of beside) spots.push([left, y - 21], [left, y + 5]);
  const boxes = spots.map(([left, top]) => ({ left, top, right: left + textWidth, bottom: top + 16 }));
  const free = boxes.find((box) => isInside(box, width, height) && !taken.some((other) => overlap(box, other)));
  if (free) taken.push(free);
  return free;
}

const isInside = ({ left, right, top, bottom }, width, height) =>
  left > 2 && right < width - 2 && top > 2 && bottom < height - 2;
const overlap = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
