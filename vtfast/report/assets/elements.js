"use strict";
// Elements and numbers. Text goes into the page as text nodes only: nothing here parses HTML.

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

function element(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function whole(number) {
  return number.toLocaleString("en");
}

// A number with three digits.
function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3) return value.toExponential(1);
  if (size >= 1e3) return whole(Math.round(value));
  return String(Number(value.toPrecision(3)));
}

function withUnit(value, unit) {
  if (unit === "%") return `${value.toFixed(1)} %`;
  return unit ? `${short(value)} ${unit}` : short(value);
}
