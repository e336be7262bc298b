"use strict";
const page = JSON.parse(document.getElementById("data").textContent);
const DRAWN = "http://www.w3.org/2000/svg";
const SVG = new Set(["svg", "path", "line", "use"]);

// Texts become text nodes and nothing else, so that no name can be markup.
function make(tag, attributes = {}, ...children) {
  const made = SVG.has(tag) ? document.createElementNS(DRAWN, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter(child => child !== null && child !== undefined && child !== ""));
  return made;
}

const severalModels = new Set(page.detectors.map(detector => detector.model)).size > 1;
