// The tables of operations and agents, the counts above them, and their pages.

import { $, Nodes, budget, figure, h, many, path, place, put, s, set, shown, timing } from "./dom.js";

// A bar of budget has room for one and a half budgets.
const WIDTH = 90;
const WHOLE = 60;

function operationRow() {
	return h("tr",
		h("th", { scope: "row" }, h("bdi", h("a")), h("span.sub")),
		h("td.mid", h("bdi")),
		h("td.mid", h("bdi")),
		h("td.mid"),
		h("td.mid", h("span.tag")),
		h("td.budget",
			h("span.tag.small"),
			s("svg", { viewBox: `0 0 ${WIDTH} 8`, "aria-hidden": "true" },
				s("rect.track", { width: WIDTH, height: 8, rx: 2 }),
				s("rect.fill", { height: 8, rx: 2 }),
				s("rect.over", { x: WHOLE, height: 8 }),
				s("path.edge", { d: `M${WHOLE} 0v8` })),
			h("span")),
		h("td.mid.number"),
		h("td.mid.number"));
}

function fillOperation(row, operation) {
	const [name, agent, type, phase, , used, left, age] = row.cells;
	const [small, meter, said] = used.children;
	const [words, tone] = timing(operation);
	const link = name.querySelector("a");
	put(link, shown(operation.id));
	set(link, "href", `#${path(operation)}`);
	put(name.lastChild, `${place(operation)}, ${shown(operation.phase)}`);
	put(agent.firstChild, shown(operation.agent_id));
	put(type.firstChild, shown(operation.type));
	put(phase, shown(operation.phase));
	for (const [mark, size] of [[row.cells[4].firstChild, ""], [small, "small "]]) {
		put(mark, words);
		set(mark, "class", `${size}tag ${tone}`);
	}
	const [, fill, over] = meter.children;
	const part = (operation.used ?? 0) * WHOLE;
	set(meter, "class", `meter ${tone}`);
	set(fill, "width", Math.min(part, WHOLE).toFixed(1));
	set(over, "width", Math.min(Math.max(part - WHOLE, 0), WIDTH - WHOLE).toFixed(1));
	put(said, budget(operation));
	put(left, figure(operation.beats_left));
	put(age, figure(operation.passed));
}

function health({ silent, state, healthy }) {
	if (silent) return ["silent", "silent"];
	if (healthy === false) return ["unhealthy", "late"];
	if (state === "unknown") return ["not known", "early"];
	return [state === "executing" ? "healthy, busy" : "healthy, idle", "on_time"];
}

function agentRow({ agent_id: agent }) {
	return h("tr",
		h("th", { scope: "row" }, h("bdi", h("button.plain", { "data-agent": agent }, shown(agent))), h("span.sub")),
		h("td", h("span")),
		h("td.number"),
		h("td"));
}

function fillAgent(row, agent) {
	const [name, tag, live, late] = row.cells;
	const [words, tone] = health(agent);
	put(name.lastChild, agent.healthy === false ? shown(agent.notes) : "");
	put(tag.firstChild, words);
	set(tag.firstChild, "class", `tag ${tone}`);
	put(live, figure(agent.live));
	put(late, figure(agent.late));
	late.classList.toggle("late", agent.late > 0);
}

/** The buttons that page through a table; `turn` is called with the offset of a page. */
class Pages {
	constructor(nav, turn) {
		const button = (words, step) => h("button", { click: () => turn(Math.max(this.offset + step * this.limit, 0)) }, words);
		this.parts = [button("Previous", -1), h("span"), button("Next", 1)];
		nav.append(...this.parts);
		Object.assign(this, { nav, turn });
	}

	show(offset, limit, { total, items: { length } }) {
		const [back, text, on] = this.parts;
		Object.assign(this, { offset, limit });
		this.nav.hidden = total <= limit && !offset;
		put(text, `${figure(offset + 1)}–${figure(offset + length)} of ${figure(total)}`);
		back.disabled = !offset;
		on.disabled = offset + length >= total;
		// The list is shorter now.
		if (offset && !length) this.turn(0);
	}
}

// A count, and the outcome and the timing that are shown when it is chosen.
const COUNTS = [["live", "live", ""], ["on_time", "live", "on_time"], ["slow", "live", "slow"], ["late", "live", "late"], ["silent", "live", "silent"], ["done", "done", ""], ["failed", "failed", ""]];

/** `choose` is called with what changes of the query. */
export class Tables {
	constructor(choose) {
		const rows = (id, ...how) => new Nodes($(id).tBodies[0], path, ...how);
		this.operations = rows("operations", operationRow, fillOperation);
		this.agents = rows("agents", agentRow, fillAgent);
		this.operationPages = new Pages($("operations-pages"), (offset) => choose({ offset }));
		this.agentPages = new Pages($("agents-pages"), (offset) => choose({ agents_offset: offset }));
		this.counts = COUNTS.map(([name, outcome, how]) =>
			h(`button.count.${name}`, { click: () => choose({ outcome, timing: how, offset: 0 }) }, h("b", "–"), h("span", name.replace("_", " "))));
		$("counts").append(...this.counts);
		$("agents").onclick = ({ target: { dataset: { agent } } }) => agent && choose({ agent, offset: 0 });
		$("operations").tHead.onclick = ({ target }) => {
			const { sort } = target.closest("th").dataset;
			if (sort) choose((query) => ({ sort, reverse: query.sort === sort && !query.reverse, offset: 0 }));
		};
	}

	/** Show which of the columns and counts the query has chosen. */
	mark({ sort, reverse, outcome, timing: how }) {
		// What used most and what is oldest come first; all else rises.
		const falls = (sort === "used" || sort === "age") !== reverse;
		for (const head of $("operations").tHead.rows[0].cells) {
			set(head, "aria-sort", head.dataset.sort === sort && (falls ? "descending" : "ascending"));
		}
		COUNTS.forEach(([, itsOutcome, itsTiming], i) => set(this.counts[i], "aria-pressed", String(itsOutcome === outcome && itsTiming === how)));
	}

	show({ operations, agents, totals, types }, query) {
		COUNTS.forEach(([name], i) => {
			put(this.counts[i].firstChild, figure(totals[name]));
			this.counts[i].classList.toggle("zero", !totals[name]);
		});
		this.operations.show(operations.items);
		this.agents.show(agents.items);
		this.operationPages.show(query.offset, query.limit, operations);
		this.agentPages.show(query.agents_offset, query.agents_limit, agents);
		put($("operations-shown"), operations.total ? many(operations.total, "operation") : "No operation matches the filters.");
		const bad = [[totals.agents_unhealthy, "unhealthy"], [totals.agents_silent, "silent"]].filter(([number]) => number);
		put($("agents-shown"), [many(totals.agents, "agent"), ...bad.map(([number, word]) => `${figure(number)} ${word}`)].join(", "));
		const names = types.slice(0, 100).map(({ type }) => h("option", { value: type }));
		if ($("types").children.length !== names.length) $("types").replaceChildren(...names);
	}
}
