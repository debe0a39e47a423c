"use strict";
// The page of a report: filters, tables that sort, plots, and the dialog that shows a record.
(() => {
  const content = JSON.parse(document.getElementById("content").textContent);
  const links = document.currentScript.dataset.links;
  const byName = new Map(content.runs.filter(run => run.name).map(run => [run.name, run]));
  const form = document.getElementById("filters");
  const section = document.getElementById("section");
  const served = "served" in document.body.dataset;
  let excerpts = null; // parsed when the first record is opened
  let board = null;

  const make = (tag, text = "", attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  // ---- filters

  const chosen = () => Object.fromEntries([...form.elements].filter(e => e.name).map(e => [e.name, e.value]));

  // Whether a run or a line of the leaderboard is left by the filters.
  const left = (about, filters = chosen()) =>
    ["scenario", "fm"].every(name => filters[name] === "*" || about[name] === filters[name]) &&
    (filters.method === "*" || about.kind === filters.method) &&
    (filters.profile === "*" || (about.profiles ?? [about.profile]).includes(filters.profile));

  function filtered() {
    const filters = chosen();
    const shown = content.lines.filter(line => left(line, filters)).length;
    document.getElementById("count").textContent = `${shown} of ${content.lines.length} lines`;
    if (board) board.draw();
    if (section) {
      const open = new Set(content.runs.filter(run => left(run, filters)).map(run => run.section));
      for (const option of section.options) option.disabled = !open.has(option.value);
      if (section.selectedOptions[0]?.disabled) {
        section.value = [...section.options].find(option => !option.disabled)?.value ?? section.value;
      }
    }
    remember();
    drawAll();
  }

  // What was chosen outlives the page's being loaded anew, which a served one does by itself.
  function remember() {
    if (!served) return;
    sessionStorage.setItem("chosen", JSON.stringify({ ...chosen(), section: section?.value }));
  }

  function recall() {
    if (!served) return;
    const before = JSON.parse(sessionStorage.getItem("chosen") ?? "{}");
    for (const element of [...form.elements, ...(section ? [section] : [])]) {
      const value = before[element.name || element.id];
      if (value !== undefined && [...(element.options ?? [])].some(o => o.value === value)) element.value = value;
    }
  }

  // ---- tables

  async function tables() {
    const source = JSON.parse(document.getElementById("tables-source").textContent);
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    const { jQuery } = await import(url);
    URL.revokeObjectURL(url);
    const bare = { order: [], autoWidth: false, layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null } };
    board = jQuery("#board").DataTable({ ...bare, paging: false });
    board.search.fixed("filters", (_, __, index) => left(content.lines[index])).draw();
    jQuery("#all-runs").DataTable({
      ...bare,
      pageLength: 25,
      layout: { topStart: "search", topEnd: null, bottomStart: "info", bottomEnd: "paging" },
      language: { search: "Search" },
    });
    return (table, columns) =>
      jQuery(table).DataTable({
        ...bare, ...columns, pageLength: 25, layout: { ...bare.layout, bottomStart: "info", bottomEnd: "paging" },
      });
  }
  const ready = tables();

  // ---- plots

  // The rows of a plot as objects, each with what its run or its line is.
  function rowsOf(plot) {
    const { columns, rows } = content.figures[plot.figures];
    const whose = columns[0] === "line" ? content.lines : content.runs;
    const filters = chosen();
    const open = whose.map(about => (plot.every || about.section === section.value) && left(about, filters));
    const first = plot.first ? rows.find(row => open[row[0]])?.[0] : undefined;
    const found = [];
    for (const row of rows) {
      if (!open[row[0]] || (first !== undefined && row[0] !== first)) continue;
      const { method, scenario, seed, name, record } = whose[row[0]];
      const entry = { method, scenario, seed, name: name ?? record };
      columns.forEach((column, place) => (entry[column] = row[place]));
      found.push(entry);
    }
    return found;
  }

  const written = value =>
    value === null || value === undefined ? "–" : typeof value === "number" ? String(Number(value.toPrecision(5))) : String(value);

  function alternative(plot, rows) {
    if (!rows.length) return `${plot.title}: nothing to show here`;
    const values = rows.map(row => row[plot.summary]).filter(value => value !== null);
    const methods = [...new Set(rows.map(row => row.method))];
    const range = `${plot.summary} from ${written(Math.min(...values))} to ${written(Math.max(...values))}`;
    return `${plot.title}: ${rows.length} points of ${methods.join(", ")}; ${range}. The numbers are in the table below.`;
  }

  // The plot's own specification, with no methods in the legend that it has no rows of; each keeps its colour.
  function drawing(plot, rows) {
    const present = new Set(rows.map(row => row.method));
    return JSON.parse(JSON.stringify(plot.spec), (_, part) => {
      if (part?.field !== "method" || !part.scale?.domain) return part;
      const kept = part.scale.domain.map((method, place) => [method, part.scale.range[place]]).filter(([method]) => present.has(method));
      return { ...part, scale: { domain: kept.map(([method]) => method), range: kept.map(([, colour]) => colour) } };
    });
  }

  const views = new Map();

  async function draw(figure) {
    const plot = content.plots[figure.dataset.plot];
    const chart = figure.querySelector(".chart");
    const rows = rowsOf(plot);
    chart.setAttribute("aria-label", alternative(plot, rows));
    views.get(figure)?.finalize();
    views.delete(figure);
    numbers(figure, plot, rows);
    if (!rows.length) {
      chart.replaceChildren(make("p", "Nothing of this is recorded for what is chosen.", { class: "hint" }));
      return;
    }
    const width = Math.max(220, chart.clientWidth - 8);
    const config = { ...content.config, legend: { ...content.config.legend, columns: Math.max(1, Math.floor(width / 150)) } };
    const { step } = plot.spec.height ?? {}; // of each line of an axis of names
    const height = step ? step * new Set(rows.map(row => row[plot.spec.encoding.y.field])).size : 260;
    const spec = { ...drawing(plot, rows), width, height, autosize: { type: "fit-x", contains: "padding" }, data: { values: rows } };
    // Within the chart, which keeps its role and its text: the drawing would give the element others.
    const place = make("div");
    chart.replaceChildren(place);
    const { view } = await vegaEmbed(place, spec, {
      mode: "vega-lite", ast: true, renderer: "svg", actions: false, config, tooltip: { theme: "page" },
    });
    // The drawing is one image: its parts are not read out one by one.
    place.setAttribute("aria-hidden", "true");
    for (const part of [place, ...place.querySelectorAll("[role]")]) {
      for (const name of ["role", "aria-roledescription", "aria-label"]) part.removeAttribute(name);
    }
    view.addEventListener("click", (_, item) => item?.datum?.name && open(item.datum.name));
    views.set(figure, view);
  }

  // Plots are drawn when they come near the window: a page of many opens at once.
  const near = new Set();
  const watcher = new IntersectionObserver(entries => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !near.has(target)) {
        near.add(target);
        draw(target);
      }
    }
  }, { rootMargin: "400px" });

  function drawAll() {
    for (const figure of document.querySelectorAll("figure[data-plot]")) if (near.has(figure)) draw(figure);
  }

  // The table behind a plot is made when it is opened.
  function numbers(figure, plot, rows) {
    const details = figure.querySelector("details");
    const place = details.querySelector(".scroll");
    place.replaceChildren();
    const fill = async () => {
      if (!details.open || place.firstChild) return;
      const columns = content.figures[plot.figures].columns.slice(1);
      const seeds = content.figures[plot.figures].columns[0] === "run";
      const heads = ["method", "scenario", ...(seeds ? ["seed"] : []), ...columns, "record"];
      const table = make("table");
      table.append(make("caption", plot.title));
      const head = make("tr");
      heads.forEach(name => head.append(make("th", name.replaceAll("_", " "), { scope: "col" })));
      table.append(make("thead"));
      table.tHead.append(head);
      place.append(table);
      const enhance = await ready;
      const link = name => (name ? make("a", name, { href: `#run-${name}` }) : make("span", "–"));
      enhance(table, {
        data: rows,
        paging: rows.length > 25,
        columns: heads.map(name => ({
          data: row => (name === "record" ? row.name : row[name]) ?? null,
          className: rows.some(row => typeof row[name] === "number") ? "number" : "",
          render: (value, type) =>
            type !== "display" ? value : name === "record" ? link(value) : make("span", written(value)),
        })),
      });
    };
    details.ontoggle = fill;
    fill();
  }

  // ---- records

  const dialog = document.getElementById("record");

  function pairs(list, entries) {
    list.replaceChildren();
    for (const [name, value] of entries) {
      if (value === null || value === undefined || value === "") continue;
      const cell = make("dd");
      cell.append(value instanceof Node ? value : document.createTextNode(String(value)));
      list.append(make("dt", name), cell);
    }
  }

  function open(name) {
    const run = byName.get(name);
    if (!run) return;
    excerpts ??= JSON.parse(document.getElementById("excerpts").textContent);
    const record = excerpts[name];
    const made = record.provenance ?? {};
    const find = selector => dialog.querySelector(selector);
    find("#record-title").textContent = `${run.method} on ${run.scenario}, seed ${run.seed}`;
    const file = links + run.file.split("/").map(encodeURIComponent).join("/");
    const error = record.error ? `: ${record.error.type}: ${record.error.message}` : "";
    pairs(find("dl"), [
      ["status", run.status + error], ["FM", run.fm], ["profile", run.profile], ["key", run.key],
      ["file", make("a", run.file, { href: file })],
    ]);
    find(".command").replaceChildren(...run.command.flatMap((part, place) => [...(place ? [" "] : []), make("span", part)]));
    find(".notes").textContent = run.notes.join("; ");
    pairs(find(".provenance"), [
      ["finished", made.finished], ["fedbench", made.fedbench],
      ["commit", made.git ? made.git.commit + (made.git.dirty ? ", with changes" : "") : null],
      ["device", made.device], ["processor", made.hardware?.cpu], ["precision", record.identity.precision],
      ["Python", made.python], ["torch", made.packages?.torch], ["transformers", made.packages?.transformers],
      ["data hash", record.identity.data_hash], ["FM hash", record.identity.fm_hash],
    ]);
    find(".json").textContent = JSON.stringify(record, null, 1);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    if (location.hash !== `#run-${name}`) history.replaceState(null, "", `#run-${name}`);
  }

  const asked = () => location.hash.startsWith("#run-") && open(location.hash.slice(5));
  dialog.addEventListener("close", () => history.replaceState(null, "", location.pathname + location.search));
  document.getElementById("close").addEventListener("click", () => dialog.close());
  addEventListener("hashchange", asked);

  // ---- start

  recall();
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("input", filtered);
  form.addEventListener("reset", () => setTimeout(filtered));
  section?.addEventListener("input", () => (remember(), drawAll()));
  document.querySelectorAll("figure[data-plot]").forEach(figure => watcher.observe(figure));
  ready.then(filtered);
  asked();

  let width = innerWidth;
  let later = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(later);
    later = setTimeout(drawAll, 200);
  });
  // On paper there are all plots, also those that nobody has scrolled to.
  addEventListener("beforeprint", () => {
    for (const figure of document.querySelectorAll("figure[data-plot]")) {
      if (!near.has(figure)) {
        near.add(figure);
        draw(figure);
      }
    }
  });

  if (served) {
    let state = null;
    setInterval(async () => {
      try {
        const now = await (await fetch("state", { cache: "no-store" })).text();
        if (state !== null && now !== state && !dialog.open) location.reload();
        state ??= now;
      } catch {
        document.body.classList.add("gone"); // the server has ended; the page stays as it is
      }
    }, 3000);
  }
})();
