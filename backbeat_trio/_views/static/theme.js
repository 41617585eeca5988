// A plain script, which runs before the first paint, so the page never flashes.
try {
	for (const name of ["theme", "keys"]) {
		const chosen = localStorage.getItem(`backbeat.${name}`);
		if (chosen) document.documentElement.dataset[name] = chosen;
	}
} catch {
	// Storage is switched off.
}
