// What opens above the page: signing in, the actions, and the history of one operation.

import { $, budget, figure, h, path, place, put, shown, table, tag, timing } from "./dom.js";

/** Send JSON and return the answer; raise an `Error` whose message says what went wrong. */
async function send(to, body) {
	const answer = await fetch(`api/v1/${to}`, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) }).catch(() => {
		throw new Error("The dashboard does not answer, so nothing is known to have changed.");
	});
	const said = await answer.json().catch(() => ({}));
	if (answer.ok) return said;
	throw Object.assign(new Error(shown(said.detail ?? `The dashboard refused this (${answer.status}).`)), { status: answer.status });
}

document.addEventListener("click", ({ target }) => {
	// A dialog's backdrop is a part of the dialog.
	if (target.matches("dialog, [data-close]")) target.closest("dialog").close();
});

/** Open a dialog with a form; it stays open, and says why, as long as `submit` fails. */
function ask(dialog, submit) {
	const form = dialog.querySelector("form");
	const button = form.querySelector(".main");
	const error = form.querySelector(".error");
	put(error, "");
	form.onsubmit = async (event) => {
		event.preventDefault();
		put(error, "");
		button.disabled = true;
		try {
			await submit(Object.fromEntries(new FormData(form)));
			dialog.close();
		} catch (failure) {
			put(error, failure.message);
		}
		button.disabled = false;
	};
	dialog.showModal();
}

const input = (words, attributes) => h("label", words, h("input", attributes));

/** Signing in, and what needs it; `say` announces what was done. */
export class Actions {
	constructor(say) {
		this.say = say;
		$("token").onclick = () => (this.signedIn ? this.#signOut() : this.signIn());
		$("set-tempo").onclick = () => this.#setTempo();
		$("pause").onclick = () => this.#pause();
	}

	/** Ask what this browser may do. */
	async begin() {
		const answer = await fetch("api/v1/access").catch(() => null);
		if (!answer?.ok) return;
		const { actions, token_to_read: reading, logged_in: known } = await answer.json();
		this.#mark(known);
		this.possible = actions;
		$("token").hidden = !actions && !reading;
		$("set-tempo").hidden = $("pause").hidden = !actions;
		$("no-actions").hidden = actions;
	}

	show(grid) {
		this.grid = grid;
		put($("pause"), grid.paused ? "Resume…" : "Pause…");
	}

	#mark(signedIn) {
		this.signedIn = signedIn;
		put($("token"), signedIn ? "Sign out" : "Sign in");
	}

	signIn(then) {
		const dialog = $("token-dialog");
		dialog.querySelector("form").reset();
		ask(dialog, async ({ token }) => {
			await send("login", { token });
			this.#mark(true);
			this.say("Signed in.");
			if (then) dialog.addEventListener("close", then, { once: true });
		});
	}

	async #signOut() {
		await send("logout", {}).then(() => location.reload(), ({ message }) => this.say(message));
	}

	/** Ask for the token if need be, then what the action needs, and send it. */
	#act(action) {
		if (!this.signedIn) {
			this.signIn(() => this.#act(action));
			return;
		}
		const { title, text, word, fields = [], to, body = () => ({}), done } = action;
		const dialog = $("act-dialog");
		put($("act-title"), title);
		put($("act-text"), text);
		put(dialog.querySelector(".main"), word);
		$("act-fields").replaceChildren(...fields);
		ask(dialog, async (given) => {
			try {
				this.say(done(await send(to, body(given))));
			} catch (failure) {
				if (failure.status !== 401) throw failure;
				// The login has ended meanwhile.
				this.#mark(false);
				dialog.addEventListener("close", () => this.#act(action), { once: true });
			}
		});
	}

	#setTempo() {
		this.#act({
			title: "Set the tempo",
			text: "All deadlines of the cluster follow: a slower beat gives all work more time, a faster one less.",
			word: "Set tempo",
			fields: [
				input("Beats per minute", { name: "bpm", type: "number", min: 0.1, max: 6000, step: "any", required: "", value: this.grid?.tempo_bpm || 2 }),
				input("From beat (the next downbeat if empty)", { name: "beat", type: "number", min: 0 }),
			],
			to: "tempo",
			body: ({ bpm, beat }) => ({ bpm: Number(bpm), at_beat: beat ? Number(beat) : null }),
			done: ({ effective_beat: beat }) => `The tempo changes at beat ${figure(beat)}.`,
		});
	}

	#pause() {
		const paused = this.grid?.paused;
		this.#act({
			title: paused ? "Resume the beat?" : "Pause the beat?",
			text: paused ? "Beats go on at the tempo from before, and budgets run out again." : "The whole cluster stops counting beats. No budget runs out until somebody resumes it.",
			word: paused ? "Resume the beat" : "Pause the beat",
			to: paused ? "resume" : "pause",
			done: ({ effective_beat: beat }) => `The beat ${paused ? "resumes" : "pauses"} at beat ${figure(beat)}.`,
		});
	}

	cancel(operation) {
		const name = shown(operation.id);
		this.#act({
			title: "Cancel this operation?",
			text: `${name} (${place(operation)}) is told to stop. This cannot be taken back.`,
			word: "Cancel the operation",
			fields: [input("Reason", { name: "reason", required: "", maxlength: 200, autocomplete: "off" })],
			to: `operations/${path(operation)}/cancel`,
			body: ({ reason }) => ({ reason }),
			done: () => `${name} was told to stop.`,
		});
	}
}

function branch({ name, operation, children, omitted }, chosen) {
	const below = children.map((child) => branch(child, chosen));
	if (omitted) below.push(h("li.sub", `${figure(omitted)} more`));
	const line = operation
		? [h("bdi", h("a", { href: `#${path(operation)}`, "aria-current": path(operation) === path(chosen) && "true" }, shown(operation.id))), " ", tag(timing(operation)), h("span.sub", `${place(operation)}, ${budget(operation)}`)]
		: [h("bdi", shown(name)), h("span.sub", "not seen here")];
	return h("li", ...line, ...(below.length ? [h("ul", ...below)] : []));
}

/** The history of the operation that the address names, kept up to date while open. */
export class History {
	constructor(actions) {
		this.actions = actions;
		this.dialog = $("operation-dialog");
		this.dialog.onclose = () => {
			if (this.open) history.replaceState(null, "", location.pathname + location.search);
			this.open = "";
		};
		window.onhashchange = () => this.follow();
	}

	follow() {
		const name = location.hash.slice(1);
		this.open = name.includes("/") ? name : "";
		if (!this.open) {
			this.dialog.close();
			return;
		}
		this.seen = "";
		put($("operation-title"), "Operation");
		$("operation-body").replaceChildren("Loading.");
		if (!this.dialog.open) this.dialog.showModal();
		this.refresh();
	}

	async refresh() {
		const name = this.open;
		if (!name || this.loading) return;
		this.loading = true;
		try {
			const [one, all] = await Promise.all(["operations", "tree"].map((kind) => fetch(`api/v1/${kind}/${name}`)));
			const [text, whole] = [await one.text(), all.ok ? await all.text() : "null"];
			if (name === this.open && text + whole !== this.seen) {
				this.seen = text + whole;
				if (one.ok) this.#fill(JSON.parse(text), JSON.parse(whole));
				else this.#fail(one.status === 404 ? "This operation is not known here. It may have ended some bars ago." : `The dashboard refused this (${one.status}).`);
			}
		} catch {
			this.seen = "";
			this.#fail("The dashboard does not answer.");
		}
		this.loading = false;
		if (name !== this.open) this.refresh();
	}

	#fail(words) {
		$("operation-body").replaceChildren(h("p.error", { role: "alert" }, words));
	}

	#fill(operation, tree) {
		const { phase, start_beat: start, last_beat: last, history: phases, notes, live } = operation;
		const body = $("operation-body");
		const index = [...body.querySelectorAll("a, button")].indexOf(document.activeElement);
		const facts = [["Type", shown(operation.type)], ["Agent", shown(operation.agent_id)], ["Phase", shown(phase)], ["From beat", figure(start)], ["Last claim", figure(last)], ["Beats left", figure(operation.beats_left)], ["Peers", figure(operation.peers)]];
		const until = (i) => Math.max((phases[i + 1]?.beat ?? last) - phases[i].beat, 0);
		put($("operation-title"), shown(operation.id));
		body.replaceChildren(
			h("p.lead", tag(timing(operation)), ` ${budget(operation)}`),
			h("dl.facts", ...facts.map(([name, value]) => h("div", h("dt", name), h("dd", h("bdi", value))))),
			h("p.notes", h("bdi", shown(notes))),
			h("h3", "History"),
			table("The phases that were seen", ["Phase", "From beat", "Beats"], phases.map(({ phase: name, beat }, i) => [name, beat, until(i)])),
			...(tree && (tree.children.length || tree.name !== `${operation.agent_id}/${operation.id}`) ? [h("h3", "The whole that it is a part of"), h("ul.tree", branch(tree, operation))] : []),
			...(live && this.actions.possible ? [h("p.buttons", h("button", { click: () => this.actions.cancel(operation) }, "Cancel this operation…"))] : []),
		);
		if (index >= 0) body.querySelectorAll("a, button")[index]?.focus({ preventScroll: true });
	}
}
