// Where the cluster is on its grid, and in a sentence how it is doing.

import { $, duration, figure, h, many, put, s, shown } from "./dom.js";

const WIDTH = 320;
// A bar of more beats than this is drawn as one piece.
const MOST_CELLS = 32;
// What sweeps over a bar faster than this only flickers.
const SHORTEST_BAR_MS = 800;

/** The moving beat, worked out between the server's events from position and tempo. */
export class Pulse {
	#said = "";

	constructor(still) {
		this.still = still;
		this.head = s("rect.head", { width: 3, height: 24, rx: 1.5 });
	}

	/** Go on from the grid that came at `at`, a reading of `performance.now()`. */
	take(grid, at) {
		Object.assign(this, { grid, at });
		this.frame ??= requestAnimationFrame((now) => this.#step(now));
	}

	stop() {
		cancelAnimationFrame(this.frame);
		this.frame = undefined;
	}

	#step(now) {
		const { position, tempo_bpm: bpm, paused, beats_per_bar: size } = this.grid;
		const at = Math.max(position + (paused ? 0 : (Math.max(now - this.at, 0) * bpm) / 60000), 0);
		const beat = Math.floor(at);
		const fast = 60000 * size < bpm * SHORTEST_BAR_MS;
		const within = (this.still.matches ? beat : at) - Math.floor(beat / size) * size;
		// An attribute of SVG, which needs no layout.
		this.head.setAttribute("transform", `translate(${((within / size) * WIDTH).toFixed(1)} 0)`);
		const all = `${beat} ${bpm} ${paused} ${size}`;
		if (all !== this.#said) {
			this.#said = all;
			this.#layout(size, fast);
			this.cells.forEach((cell, i) => cell.classList.toggle("past", !fast && this.cells.length > 1 && i <= beat % size));
			put($("beat"), figure(beat));
			put($("bars"), figure(Math.floor(beat / size)));
			put($("inbar"), `${figure((beat % size) + 1)} of ${figure(size)}`);
			put($("tempo"), paused ? "paused" : `${figure(bpm)} BPM`);
		}
		this.frame = requestAnimationFrame((later) => this.#step(later));
	}

	#layout(size, fast) {
		this.head.classList.toggle("off", fast);
		const length = size <= MOST_CELLS ? size : 1;
		if (this.cells?.length === length) return;
		const width = WIDTH / length;
		this.cells = Array.from({ length }, (_, i) =>
			s("rect.cell", { x: i * width, y: i ? 6 : 2, width: Math.max(width - 4, 2), height: i ? 12 : 20, rx: 2 }));
		$("bar").replaceChildren(...this.cells, this.head);
	}
}

function whereabouts(agents) {
	const bad = agents.items.filter(({ late, silent_operations: silent }) => late + silent);
	const named = bad.slice(0, 3).map(({ agent_id: id, late, silent_operations: silent }) => `${shown(id)} (${figure(late + silent)})`);
	return named.join(", ") + (bad.length > named.length ? " and others" : "");
}

/** Return how the cluster is doing: a key that changes with the state, a tone, two sentences. */
export function verdict({ grid, totals: { live, late, silent, slow }, agents }) {
	const ago = duration(grid.last_frame_age);
	const [state, title, why] =
		!grid.connected ? ["cut", "No connection to NATS", "Beats are counted locally, and no claims arrive."]
		: grid.paused ? ["paused", "The beat is paused", ""]
		: grid.grid === "local" ? ["local", "No metronome is heard", "Beats are counted locally, at the configured tempo."]
		: grid.grid === "holdover" ? ["holdover", "No beat frames arrive", `Beats go on at the last known tempo. The last frame came ${ago} ago.`]
		: grid.tempo_drift === "severe" ? ["severe", "Off the beat", "Beat frames are far from the grid that they announce."]
		: grid.tempo_drift === "elevated" ? ["elevated", "Nearly on the beat", "Beat frames are a little off the grid that they announce."]
		: ["beat", "On the beat", ""];
	const are = (number) => (number === 1 ? "is" : "are");
	const counts = [[late, "late"], [silent, "silent"]].filter(([number]) => number);
	const trouble = counts.map(([number, word], i) => (i ? `${figure(number)} ${are(number)} ${word}` : `${figure(number)} of ${many(live, "operation")} ${are(number)} ${word}`)).join(", ");
	const well = live > 1 ? `all ${many(live, "operation")} are within their budgets` : live ? "the one operation is within its budget" : "no operation is running";
	const words = counts.map(([, word]) => word).join(" or ");
	const where = counts.length ? whereabouts(agents) : "";
	const detail = where ? `${words[0].toUpperCase()}${words.slice(1)} on ${where}.` : slow ? `${many(slow, "operation")} ${are(slow)} past the soft edge.` : "";
	return {
		key: `${state === "elevated" ? "beat" : state} ${words}`,
		tone: late || grid.claims_refused || !["beat", "paused", "elevated"].includes(state) ? "late" : silent ? "silent" : state === "beat" ? "fine" : "slow",
		title: grid.claims_refused ? "Permissions keep all claims from here" : `${title}: ${trouble || well}`,
		detail: `${why} ${detail}`.trim(),
	};
}

/** Write what is known of the metronome into the list of facts. */
export function facts({ grid }) {
	const { errors, pending, leader_id: leader, standbys, tempo_drift: drift, measured_bpm: measured } = grid;
	const changes = pending.map(({ beat, tempo_bpm: bpm }) => `${bpm ? `${figure(bpm)} BPM` : "pause"} at beat ${figure(beat)}`);
	const all = [
		["Leader", leader === null ? "none" : shown(leader), leader === null],
		["Standbys", standbys === null ? "not known" : figure(standbys), standbys === 0],
		["Pending changes", changes.join(", ") || "none"],
		["NATS", grid.connected ? "connected" : "not connected", !grid.connected],
		["Grid", shown(grid.grid), grid.grid !== "locked"],
		["Drift", shown(drift), drift === "severe" || drift === "elevated"],
		["Measured tempo", measured === null ? "–" : `${figure(measured)} BPM`],
		["Uncertainty", duration(grid.uncertainty)],
		["Last frame", grid.last_frame_age === null ? "none yet" : `${duration(grid.last_frame_age)} ago`],
		["Own lateness", duration(grid.lateness)],
		["Errors", errors.map(shown).join("; ") || "none", errors.length > 0],
	];
	const list = $("facts");
	if (!list.children.length) list.append(...all.map(([name]) => h("div", h("dt", name), h("dd"))));
	all.forEach(([, value, bad = false], i) => {
		const cell = list.children[i].lastChild;
		put(cell, value);
		cell.classList.toggle("bad", bad);
	});
}
