// The dashboard's page: follows the server's events, and shows the newest one.

import { Pulse, facts, verdict } from "./beat.js";
import { Actions, History } from "./dialogs.js";
import { $, duration, figure, h, put, set, shown } from "./dom.js";
import { Plots } from "./plots.js";
import { Tables } from "./tables.js";

const DEFAULTS = { text: "", agent: "", type: "", phase: "", timing: "", outcome: "live", sort: "used", reverse: false, limit: 25, offset: 0, agents_limit: 15, agents_offset: 0 };
const FILTERS = ["text", "agent", "type", "phase", "timing"];
// Figures older than this are said to be old.
const STALE_MS = 3000;
const TYPING_MS = 200;
const PLOTS_MS = 2000;
const AGAIN_MS = 2000;
const QUIET_MS = 3000;

/** Keep a choice for the next time, if the browser lets it. */
function remember(name, value) {
	try {
		localStorage.setItem(`backbeat.${name}`, value);
	} catch {
		// It lasts until the page is closed.
	}
}

// The query: what the server is asked for. It is in the address, to be shared.

const form = $("filters");
let query = readAddress();

function readAddress() {
	const read = { ...DEFAULTS };
	for (const [name, value] of new URLSearchParams(location.search)) {
		const usual = DEFAULTS[name];
		if (typeof usual === "number") read[name] = Number(value) || usual;
		else if (usual !== undefined) read[name] = usual === false ? value === "true" : value;
	}
	return read;
}

const search = (wanted) => new URLSearchParams(Object.entries(query).filter(wanted)).toString();
const changed = ([name, value]) => value !== DEFAULTS[name];

function choose(fields) {
	if (page.held) page.hold(false);
	query = { ...query, ...(typeof fields === "function" ? fields(query) : fields) };
	const found = search(changed);
	history.replaceState(null, "", `${location.pathname}${found && `?${found}`}${location.hash}`);
	follow();
}

function follow() {
	for (const [name, value] of Object.entries(query)) {
		const field = form.elements[name];
		if (!field || field === document.activeElement) continue;
		field[field.type === "checkbox" ? "checked" : "value"] = value;
	}
	tables.mark(query);
	plots.query = search(([name, value]) => value && FILTERS.includes(name));
	stream.query = search(([, value]) => value !== "");
	stream.open();
	if (page.key) plots.load();
}

function readForm() {
	clearTimeout(typing);
	const read = { offset: 0 };
	for (const { name, type, checked, value } of form.elements) {
		if (name) read[name] = type === "checkbox" ? checked : name === "limit" ? Number(value) : value.trim();
	}
	choose(read);
}

const clear = () => choose({ ...DEFAULTS, limit: query.limit });

let typing = 0;
document.oninput = ({ target }) => {
	if (target.form !== form) return;
	clearTimeout(typing);
	typing = setTimeout(readForm, target.type === "search" ? TYPING_MS : 0);
};
form.onsubmit = (event) => {
	event.preventDefault();
	readForm();
};
form.onreset = (event) => {
	event.preventDefault();
	clear();
};

// What the server says.

const stream = {
	lost: null,

	open() {
		clearTimeout(this.timer);
		this.source?.close();
		const source = new EventSource(`api/v1/events?${this.query}`);
		this.source = source;
		source.onmessage = ({ data }) => {
			Object.assign(this, { lost: null, refused: "" });
			page.take(JSON.parse(data));
		};
		source.onerror = () => {
			this.lost ??= performance.now();
			page.age();
			// The browser tries again by itself, but not after a refusal.
			if (source.readyState === EventSource.CLOSED) this.again();
		};
	},

	async again() {
		this.timer = setTimeout(() => this.open(), AGAIN_MS);
		const answer = await fetch(`api/v1/snapshot?${this.query}`).catch(() => null);
		this.refused = "";
		if (answer && !answer.ok) {
			const { detail } = await answer.json().catch(() => ({}));
			this.refused = shown(detail ?? `The dashboard refused the connection (${answer.status})`);
			if (answer.status === 401 && !document.querySelector("dialog[open]")) actions.signIn(() => this.open());
		}
		page.age();
	},
};

// What is shown.

const page = {
	take(view, at = performance.now()) {
		Object.assign(this, { view, at });
		if (!this.held && view.grid) pulse.take(view.grid, this.at);
		this.age();
		if (this.waiting) return;
		this.waiting = true;
		// A hidden page gets no frames; its title is seen.
		(document.hidden ? setTimeout : requestAnimationFrame)(() => this.show());
	},

	show() {
		this.waiting = false;
		const { view } = this;
		// The server answers before it knows the grid.
		if (this.held || !view?.grid) return;
		const { key, tone, title, detail } = verdict(view);
		document.title = `${title} – ${shown(view.grid.cluster_id)}`;
		if (document.hidden) return;
		put($("cluster"), shown(view.grid.cluster_id));
		put($("verdict"), title);
		put($("where"), detail);
		set($("now"), "data-tone", tone);
		facts(view);
		tables.show(view, query);
		actions.show(view.grid);
		plots.show(view);
		dialogs.refresh();
		const { dropped_agents: agents, dropped_operations: operations } = view.totals;
		put($("left-out"), agents + operations ? `Left out for want of room: ${figure(agents)} agents, ${figure(operations)} operations.` : "");
		// The first one is read with the page; after that, only changes of state are announced.
		if (this.key && this.key !== key) announce(`${title}.`, "state");
		if (!this.key) {
			performance.mark("backbeat-useful");
			setTimeout(() => plots.load());
		}
		this.key = key;
	},

	age() {
		const now = performance.now();
		const old = this.view && (now - this.at) / 1000;
		const state = stream.lost !== null ? "lost" : !this.view ? "wait" : old * 1000 > STALE_MS ? "stale" : "live";
		const lost = stream.refused || `Connection lost ${duration((now - stream.lost) / 1000)} ago, trying again`;
		put($("link"), { wait: "Connecting", live: `Live, ${Math.floor(old)} s old`, stale: `No news for ${duration(old)}`, lost: old ? `${lost}; figures are ${duration(old)} old` : lost }[state]);
		if (state === "lost" || state === "stale") pulse.stop();
		if (state === this.link) return;
		if (state === "lost" || this.link === "lost") announce(`The connection to the dashboard is ${state === "lost" ? "lost" : "back"}.`);
		this.link = state;
		set(document.body, "data-link", state);
	},

	hold(held) {
		this.held = held;
		set($("hold"), "aria-pressed", String(held));
		$("frozen").hidden = !held;
		if (held) pulse.stop();
		else this.resume();
	},

	resume() {
		if (!document.hidden && !this.held && this.view) this.take(this.view, this.at);
	},
};

let announced = -QUIET_MS;
let announcing = 0;
let news = {};

/** Have screen readers say something: the newest of each kind, and not too often. */
function announce(words, kind = "") {
	news[kind] = words;
	clearTimeout(announcing);
	announcing = setTimeout(() => {
		put($("announce"), Object.values(news).join(" "));
		announced = performance.now();
		news = {};
	}, announced + QUIET_MS - performance.now());
}

// The theme and the keys.

const light = matchMedia("(prefers-color-scheme: light)");
const root = document.documentElement;
const other = () => ((root.dataset.theme ?? (light.matches ? "light" : "dark")) === "dark" ? "light" : "dark");

function showTheme() {
	put($("theme"), other() === "dark" ? "Dark" : "Light");
	set($("theme"), "aria-label", `${$("theme").textContent} theme`);
	plots.recolour();
}

function switchTheme() {
	root.dataset.theme = other();
	remember("theme", root.dataset.theme);
	showTheme();
}

const KEYS = [
	["/", "Search the operations", () => form.elements.text.focus()],
	["l", "Only the late operations", () => choose({ outcome: "live", timing: "late", offset: 0 })],
	["a", "All live operations", clear],
	["n", "Next page of operations", () => $("operations-pages").lastChild.click()],
	["p", "Previous page of operations", () => $("operations-pages").firstChild.click()],
	["f", "Freeze the display, or go on", () => page.hold(!page.held)],
	["t", "Dark or light theme", switchTheme],
	["?", "This help", () => $("help-dialog").showModal()],
];

const keysOn = $("keys-on");
keysOn.checked = root.dataset.keys !== "off";
keysOn.onchange = () => remember("keys", keysOn.checked ? "on" : "off");
$("keys").append(...KEYS.map(([key, words]) => h("tr", h("th", { scope: "row" }, h("kbd", key)), h("td", words))));
document.onkeydown = (event) => {
	const act = KEYS.find(([key]) => key === event.key)?.[2];
	if (!act || !keysOn.checked || event.ctrlKey || event.metaKey || event.altKey) return;
	if (document.querySelector("dialog[open]") || event.target.matches("input:not([type=checkbox]), select")) return;
	event.preventDefault();
	act();
};

$("hold").onclick = () => page.hold(!page.held);
$("theme").onclick = switchTheme;
$("help").onclick = () => $("help-dialog").showModal();
light.onchange = showTheme;
document.onvisibilitychange = () => (document.hidden ? pulse.stop() : page.resume());

const pulse = new Pulse(matchMedia("(prefers-reduced-motion: reduce)"));
const tables = new Tables(choose);
const actions = new Actions(announce);
const dialogs = new History(actions);
const plots = new Plots();

follow();
showTheme();
dialogs.follow();
actions.begin();
setInterval(() => page.age(), 1000);
setInterval(() => document.hidden || page.held || !page.key || plots.load(), PLOTS_MS);
