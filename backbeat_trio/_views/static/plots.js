// The plots: a timeline of operations, budget used by type, and skew and drift over time.
// Each has a table of its figures, as a drawing says nothing to a screen reader.

import { $, Nodes, figure, h, many, path, percent, place, put, s, set, shown, tabulate, timing } from "./dom.js";

// Budget used, by type, in the buckets in which the server counts.

const EDGES = [0.25, 0.5, 0.75, 0.9, 1, 1.25, 1.5, 2, Infinity];
const OVER = 5;
const LABELS = EDGES.map((edge, i) => (i === 8 ? "over 200 %" : `${figure((EDGES[i - 1] ?? 0) * 100)}–${percent(edge)}`));
const MOST_TYPES = 12;
const CELL = 30;
const HEIGHT = 40;

const sum = (numbers) => numbers.reduce((all, number) => all + number, 0);

function typeRow() {
	return h("div.type",
		h("p", h("bdi.name"), h("span.sub")),
		s("svg", { viewBox: `0 0 ${9 * CELL} ${HEIGHT + 2}`, role: "img", preserveAspectRatio: "none" },
			...EDGES.map((_, i) => s(i < OVER ? "rect.within" : "rect.beyond", { x: i * CELL + 2, width: CELL - 4 })),
			s("path.edge", { d: `M${OVER * CELL} 0v${HEIGHT + 2}` })));
}

function fillType({ firstChild: { children: [name, sub] }, lastChild: svg }, { type, used, late }) {
	const [all, over] = [sum(used), sum(used.slice(OVER))];
	put(name, shown(type));
	put(sub, `${figure(all)} ended, ${over ? percent(over / all) : "none"} over budget${late ? `, ${figure(late)} late` : ""}`);
	set(svg, "aria-label", `${shown(type)}: ${figure(over)} of ${figure(all)} took longer than their budget`);
	used.forEach((number, i) => {
		const height = number && Math.max((number / Math.max(...used)) * HEIGHT, 1.5);
		set(svg.children[i], "height", height);
		set(svg.children[i], "y", HEIGHT - height);
	});
}

// The timeline.

const ROW = 18;
const TOP = 22;
const MOST_LANES = 20;
const MOST_ITEMS = 200;
const LETTER = 6.2;
const LEAST_LETTERS = 4;

const bad = ({ timing: how, outcome }) => how === "late" || how === "silent" || outcome === "failed";

/** Give each operation a lane in which nothing overlaps; those with trouble come first. */
function lanes(items, beat) {
	const taken = [];
	const placed = [];
	for (const item of items.toSorted((a, b) => bad(b) - bad(a) || a.start_beat - b.start_beat)) {
		const { start_beat: from, last_beat: last, budget_beat: edge } = item;
		const end = Math.max(item.outcome === "live" ? beat + 1 : last, from + 0.5);
		const to = Math.max(end, edge ?? 0);
		let lane = taken.findIndex((others) => others.every(([a, b]) => to <= a || from >= b));
		if (lane < 0 && taken.length < MOST_LANES) lane = taken.push([]) - 1;
		if (lane < 0) continue;
		taken[lane].push([from, to]);
		placed.push({ item, from, end, edge: edge ?? end, to, lane });
	}
	return placed;
}

function drawTimeline(box, view) {
	const { first_beat: first, last_beat: last, beat, beats_per_bar: size, items, total } = view;
	const width = Math.max(box.clientWidth, 280);
	const scale = width / (last + 1 - first);
	const x = (at) => (Math.min(Math.max(at, first), last + 1) - first) * scale;
	const placed = lanes(items, beat);
	const height = TOP + Math.max(3, ...placed.map(({ lane }) => lane + 1)) * ROW;
	const marks = [];
	for (let at = first; at <= last; at += size) {
		const bar = at / size;
		if (bar % 2) marks.push(s("rect.odd", { x: x(at), width: size * scale, height }));
		if (size * scale > 60) marks.push(s("text.mark", { x: x(at) + 5, y: 14 }, `w-${bar}`));
	}
	const state = (item) => timing({ ...item, beats_left: (item.budget_beat ?? 0) - item.last_beat });
	const drawn = placed.map(({ item, from, end, edge, to, lane }) => {
		const y = TOP + lane * ROW;
		const [words, tone] = state(item);
		const part = (kind, a, b) => s(`rect.${kind}`, { x: x(a), y, width: Math.max(x(b) - x(a), 1.5), height: ROW - 4, rx: 2 });
		const letters = Math.floor((x(to) - x(from) - 6) / LETTER);
		// For the mouse: the keyboard has the same links in the tables.
		return s("g", { "data-address": path(item) },
			s("title", `${shown(item.id)}, ${place(item)}: ${words}`),
			part(`ran.${tone}`, from, Math.min(end, edge)),
			end > edge ? part("ran.late", edge, end) : part("rest", end, edge),
			...(letters < LEAST_LETTERS ? [] : [s("text", { x: x(from) + 5, y: y + 11 }, shown(item.id).slice(0, letters))]));
	});
	const label = `${many(items.length, "operation")} in the windows w-${Math.floor(first / size)} to w-${Math.floor(last / size)}, ${figure(items.filter(({ timing: how }) => how === "late").length)} of them late`;
	box.replaceChildren(s("svg", { width, height, role: "img", "aria-label": label }, ...marks, ...drawn, s("path.now-line", { d: `M${x(beat)} 0v${height}` })));
	const hidden = total - placed.length;
	put($("timeline-left"), hidden > 0 ? `${many(hidden, "more operation")} not drawn. The filters above choose which are.` : "");
	tabulate($("timeline-table"), label, ["Operation", "Agent", "Type", "From beat", "To beat", "Budget until", "Timing"],
		items.map((item) => [h("a", { href: `#${path(item)}` }, shown(item.id)), item.agent_id, item.type, item.start_beat, item.last_beat, item.budget_beat ?? "–", state(item)[0]]));
}

// Skew and drift.

const LINES = [["skew", "Skew (ms)", "ms", 1e3, "--accent"], ["lateness", "Lateness (ms)", "ms", 1e3, "--muted"], ["drift", "Drift (%)", "%", 100, "--amber"]];
const value = (point, [name, , , factor]) => (point[name] === null ? null : point[name] * factor);
const PLOT_HEIGHT = 190;
const TABLED = 64;

const load = () => new Promise((resolve, reject) => {
	document.head.append(h("link", { rel: "stylesheet", href: "static/uplot.min.css" }), h("script", { src: "static/uplot.min.js", load: () => resolve(window.uPlot), error: reject }));
});

class SeriesPlot {
	async show(points) {
		// Not before the page has shown what matters more.
		this.library ??= load();
		const Plot = await this.library;
		this.data = [points.map(({ beat }) => beat), ...LINES.map((line) => points.map((point) => value(point, line)))];
		const size = { width: $("series").clientWidth, height: PLOT_HEIGHT };
		if (!this.plot) this.plot = this.#draw(Plot, size);
		else if (size.width !== this.plot.width) this.plot.setSize(size);
		this.plot.setData(this.data);
	}

	#draw(Plot, size) {
		// A variable is not resolved to a colour until something has that colour.
		const colour = (name) => {
			$("series").style.color = `var(${name})`;
			return getComputedStyle($("series")).color;
		};
		const font = "12px system-ui, sans-serif";
		const axis = (more) => ({ stroke: colour("--muted"), font, labelFont: font, grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, ...more });
		const range = (least) => (_, low, high) => [Math.min(low ?? 0, least ? -least : 0) * 1.1, Math.max(high ?? 0, least, 0.1) * 1.1];
		const unit = (scale, more) => axis({ scale, size: 56, values: (_, ticks) => ticks.map((tick) => `${figure(tick)} ${scale}`), ...more });
		return new Plot({
			...size,
			scales: { x: { time: false }, ms: { range: range(0) }, "%": { range: range(0.1) } },
			cursor: { show: false },
			legend: { live: false },
			axes: [axis({ label: "beat", labelSize: 18, size: 30, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? figure(tick) : "")) }), unit("ms"), unit("%", { side: 1, grid: { show: false } })],
			series: [{}, ...LINES.map(([, label, scale, , tone], i) => ({ label, scale, stroke: colour(tone), width: i ? 1.25 : 2, dash: i === 2 ? [5, 4] : [] }))],
		}, this.data, $("series"));
	}
}

/** All plots: `show` takes the server's event, `load` fetches what does not come with it. */
export class Plots {
	query = "";

	constructor() {
		this.distribution = new Nodes($("distribution"), ({ type }) => type, typeRow, fillType);
		this.series = new SeriesPlot();
		const again = () => {
			this.types = "";
			if (this.view) this.show(this.view);
			this.load();
		};
		for (const details of document.querySelectorAll("details")) details.ontoggle = again;
		window.onresize = again;
		$("timeline").onclick = ({ target }) => {
			const chosen = target.closest("[data-address]");
			if (chosen) location.hash = chosen.dataset.address;
		};
	}

	recolour() {
		// A canvas keeps the colours that it was drawn in.
		this.series.plot?.destroy();
		this.series.plot = null;
		if (this.view) this.load();
	}

	show(view) {
		this.view = view;
		const all = JSON.stringify(view.types);
		if (all === this.types) return;
		this.types = all;
		const types = view.types.toSorted((a, b) => sum(b.used) - sum(a.used) || (a.type < b.type ? -1 : 1));
		const ended = types.filter(({ used }) => sum(used));
		const more = ended.length - MOST_TYPES;
		this.distribution.show(ended.slice(0, MOST_TYPES));
		put($("types-left"), more > 0 ? `${many(more, "more type")} in the table of figures.` : ended.length ? "" : "No operation has ended lately.");
		tabulate($("distribution-table"), "Ended operations by how much of their budget they used", ["Type", "Live", "Late", "Done", "Failed", ...LABELS],
			types.slice(0, MOST_ITEMS).map(({ type, live, late, done, failed, used }) => [type, live, late, done, failed, ...used]));
	}

	async load() {
		if (this.loading) return;
		this.loading = true;
		const get = (name) => fetch(`api/v1/${name}`).then((answer) => (answer.ok ? answer.json() : null));
		try {
			const [timeline, series] = await Promise.all([get(`timeline?bars=${innerWidth < 700 ? 2 : 4}&limit=${MOST_ITEMS}${this.query && `&${this.query}`}`), get("series")]);
			if (timeline) drawTimeline($("timeline"), timeline);
			if (series) {
				await this.series.show(series.points);
				tabulate($("series-table"), "Skew, lateness and drift of the newest beats", ["Beat", "Tempo (BPM)", ...LINES.map(([, label]) => label)],
					series.points.slice(-TABLED).reverse().map((point) => [figure(point.beat), point.tempo_bpm, ...LINES.map((line) => value(point, line) ?? "–")]));
			}
		} catch {
			// Nobody answers: the line about the connection says so.
		}
		this.loading = false;
	}
}
