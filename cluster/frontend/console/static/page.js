// Small helpers for the page's elements.

export const byId = (id) => document.getElementById(id);

export const copyOf = (templateId) => byId(templateId).content.cloneNode(true);

export function show(element, isShown) {
  element.hidden = !isShown;
}

/** Text is written only where it differs: what a user has selected stays selected. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const whole = new Intl.NumberFormat("en");

export const number = (value) => whole.format(value);

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;
