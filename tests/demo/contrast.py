"""The contrast of two colours, as WCAG 2 defines it."""

from __future__ import annotations


def luminance(colour: str) -> float:
    """The relative luminance of #rrggbb as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


COLOURS_OF_TEXTS = """() => {
  const parts = colour => { const found = colour.match(/[\\d.]+/g).map(Number); return found.length < 4 ? [...found, 1] : found; };
  const over = (top, below) => below.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
  const parents = element => element ? [element, ...parents(element.parentElement)] : [];
  const hex = colour => '#' + colour.map(value => Math.round(value).toString(16).padStart(2, '0')).join('');
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), around = parents(texts.currentNode.parentElement);
    if (!text || !around[0].offsetParent || around[0].closest('script, style, :disabled')) continue;
    const grounds = around.map(element => parts(getComputedStyle(element).backgroundColor));
    const ground = grounds.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
    const colour = parts(getComputedStyle(around[0]).color);
    colour[3] *= around.reduce((product, element) => product * getComputedStyle(element).opacity, 1);
    found.push([text, hex(over(colour, ground)), hex(ground)]);
  }
  return found;
}"""
"""A function for a browser: [text, its colour, the colour behind it] of each text that is seen, without disabled controls."""
