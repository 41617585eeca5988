// Builds and updates nodes, and writes figures as words.
// Foreign strings reach the page as text nodes and attributes only, never as markup.

// What is not seen, or turns text around. The server replaces these already.
const UNSEEN = /[\0-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
const LONGEST = 200;

/** Return what may be shown of a foreign string. */
export function shown(text) {
	const safe = String(text ?? "").replace(UNSEEN, "\ufffd");
	return safe.length > LONGEST ? `${safe.slice(0, LONGEST - 1)}…` : safe;
}

export const $ = (id) => document.getElementById(id);

const builder = (create) => (spec, ...children) => {
	const [tag, ...classes] = spec.split(".");
	const node = create(tag);
	if (classes.length) node.setAttribute("class", classes.join(" "));
	if (children[0]?.constructor === Object) {
		for (const [name, value] of Object.entries(children.shift())) {
			if (typeof value === "function") node.addEventListener(name, value);
			else set(node, name, value);
		}
	}
	node.append(...children);
	return node;
};

/** Make an element of HTML, or by `s` of SVG: `h("td.number", { title: "…", click: act }, "text", node)`. */
export const h = builder((tag) => document.createElement(tag));
export const s = builder((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));

/** Set the text of a node if it differs, so a selection in it survives. */
export function put(node, text) {
	if (node.textContent !== String(text)) node.textContent = text;
}

/** Set an attribute if it differs; null, undefined and false remove it. */
export function set(node, name, value) {
	if (value === null || value === undefined || value === false) node.removeAttribute(name);
	else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Keep the children of `parent` in step with items: one node for each key, reused and moved. */
export class Nodes {
	#nodes = new Map();

	constructor(parent, key, make, fill) {
		Object.assign(this, { parent, key, make, fill });
	}

	show(items) {
		const { parent } = this;
		const focused = parent.contains(document.activeElement) && document.activeElement;
		const place = focused ? [...parent.children].findIndex((node) => node.contains(focused)) : 0;
		const wanted = new Set(items.map(this.key));
		for (const [key, node] of this.#nodes) {
			if (wanted.has(key)) continue;
			node.remove();
			this.#nodes.delete(key);
		}
		// Nothing moves under a selection or a pressed pointer.
		const still = selecting(parent);
		let next = parent.firstElementChild;
		for (const item of items) {
			const key = this.key(item);
			const old = this.#nodes.get(key);
			const node = old ?? this.make(item);
			this.#nodes.set(key, node);
			this.fill(node, item);
			if (node === next) next = next.nextElementSibling;
			else if (!old) parent.insertBefore(node, next);
			// `moveBefore` keeps the focus; older browsers do not have it.
			else if (!still) parent[parent.moveBefore ? "moveBefore" : "insertBefore"](node, next);
		}
		if (focused && document.activeElement !== focused) {
			// If the row is gone, go on from the one that took its place.
			const row = parent.children[Math.min(place, parent.children.length - 1)];
			(focused.isConnected ? focused : row?.querySelector("a, button"))?.focus({ preventScroll: true });
		}
	}
}

function selecting(node) {
	const selection = getSelection();
	return node.matches(":active") || (!selection.isCollapsed && node.contains(selection.anchorNode));
}

/** Make a table whose first column heads the rows. A cell is a number, a foreign string or a node. */
export function table(caption, heads, rows) {
	const cell = (value, i) => {
		const content = typeof value === "number" ? figure(value) : value instanceof Node ? value : shown(value);
		return i ? h(typeof value === "number" ? "td.number" : "td", content) : h("th", { scope: "row" }, content);
	};
	const head = (words, i) => h(typeof rows[0]?.[i] === "number" ? "th.number" : "th", { scope: "col" }, words);
	return h("table",
		h("caption", caption),
		h("thead", h("tr", ...heads.map(head))),
		h("tbody", ...rows.map((row) => h("tr", ...row.map(cell)))));
}

/** Show a plot's table of figures, but only while it is open and nobody is busy with it. */
export function tabulate(box, ...figures) {
	const active = document.activeElement;
	const busy = (active !== box && box.contains(active)) || selecting(box);
	if (box.parentElement.open && !busy) box.replaceChildren(table(...figures));
}

const { format } = new Intl.NumberFormat("en", { maximumFractionDigits: 3 });

export const figure = (number) => (number === null || number === undefined ? "–" : format(number));
export const many = (number, one) => `${format(number)} ${one}${number === 1 ? "" : "s"}`;
export const percent = (part) => `${format(Math.round(part * 100))} %`;

/** Write seconds in the unit that suits them. */
export function duration(seconds) {
	if (seconds === null || seconds === undefined) return "–";
	const [size, unit] = seconds < 1e-3 ? [seconds * 1e6, "µs"] : seconds < 1 ? [seconds * 1e3, "ms"] : seconds < 120 ? [seconds, "s"] : [seconds / 60, "min"];
	return `${size < 10 ? Number(size.toFixed(1)) : Math.round(size)} ${unit}`;
}

/** Return the words and the class for how an operation is doing, or did. */
export function timing({ outcome, timing: how, beats_left: left }) {
	if (outcome === "failed") return ["failed", "failed"];
	if (outcome === "live") return [how === "on_time" ? "on time" : shown(how), how];
	if (how !== "on_time") return [`ended ${shown(how)}`, how];
	return left > 0 ? ["ended early", "early"] : ["ended on time", "on_time"];
}

export const tag = ([words, tone]) => h(`span.tag.${tone}`, words);

export function budget({ passed, estimated, used, at_least: least }) {
	const from = least ? "≥ " : "";
	if (!estimated) return `${from}${many(passed, "beat")}, no budget`;
	const over = passed - estimated;
	return `${from}${percent(used)}, ${over > 0 ? `${figure(over)} over` : `${figure(passed)} of ${figure(estimated)}`}`;
}

export const place = ({ type, agent_id: agent }) => `${shown(type)} on ${shown(agent)}`;

/** Return what names an operation in paths of the API, and behind `#` its history on the page. */
export const path = ({ agent_id: agent, id }) => `${encodeURIComponent(agent)}/${encodeURIComponent(id)}`;
