// Small helpers that create elements and write numbers. Names and texts reach the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** Creates an element. Strings among the children become text nodes, so that markup in them is shown as it is. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Creates an element of an SVG image. */
export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Shows a message, or hides its element if there is none. */
export function say(id, message) {
  $(id).textContent = message;
  $(id).hidden = message === "";
}

export const shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 1).trimEnd()}…` : text);
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
export const decimal = (value, digits) => (value === null ? "none" : value.toFixed(digits).replace("-", "\u2212"));

