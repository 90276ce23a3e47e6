"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const fill = (select, labels, chosen) => {
    labels.forEach((label, place) => {
      const option = element("option", label);
      option.value = place;
      option.selected = place === chosen;
      select.append(option);
    });
  };

  // Theme: the system's, until the reader chooses.
  const root = document.documentElement;
  const theme = $("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // Tips: what the marks of a figure stand for, by mouse and by touch.
  const tip = $("tip");
  const point = (event) => {
    const mark = event.target.closest?.("[data-tip]");
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const width = Math.min(tip.offsetWidth, innerWidth - 16);
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, innerWidth - width - 8))}px`;
    tip.style.top = `${event.clientY > innerHeight - 90 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 14}px`;
  };
  addEventListener("pointermove", point);
  addEventListener("pointerdown", point);

  // Tables: a click on a heading sorts; numbers by value, unknown ones last.
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.sort === undefined ? cell.textContent : Number(cell.dataset.sort);
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    table.tHead.addEventListener("click", (event) => {
      const heading = event.target.closest("th");
      if (!heading) return;
      const up = heading.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const sign = up ? 1 : -1;
      const rows = [...table.tBodies[0].rows].map((row, place) => [key(row, heading.cellIndex), place, row]);
      rows.sort(([a, i], [b, j]) => {
        if (a === "" || b === "") return (a === "") - (b === "") || i - j;
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true })) * sign || i - j;
      });
      table.tBodies[0].append(...rows.map(([, , row]) => row));
    });
  });

  // Runs: every word of the filter has to be in the row.
  const runs = [...document.querySelectorAll("#table-runs tbody tr")];
  const narrow = () => {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const status = $("status").value;
    let shown = 0;
    for (const row of runs) {
      const text = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
      const own = text.split(/\s+/);
      // alpha=0 is not alpha=0.1.
      const fits = words.every((word) => (word.includes("=") ? own.includes(word) : text.includes(word))) && (!status || row.cells[2].textContent === status);
      row.hidden = !fits;
      shown += fits;
    }
    $("count").textContent = `${shown} of ${runs.length} runs`;
  };
  $("filter").addEventListener("input", narrow);
  $("status").addEventListener("change", narrow);
  narrow();

  // Answers. Only textContent: what a model wrote is never markup.
  const { models, prompts } = data.samples;
  fill($("left"), models, 0);
  fill($("right"), models, Math.min(1, models.length - 1));
  let page = 1;
  const marked = (text, word) => {
    const whole = element("div", undefined, "text");
    whole.dir = "auto";
    if (!word) return whole.append(text), whole;
    const lower = text.toLowerCase();
    let at = 0;
    for (let found; (found = lower.indexOf(word, at)) >= 0; at = found + word.length) {
      whole.append(text.slice(at, found), element("mark", text.slice(found, found + word.length)));
    }
    whole.append(text.slice(at));
    return whole;
  };
  const side = (name, [text, reward], won, word) => {
    const made = element("div", undefined, won ? "side won" : "side");
    made.append(element("h4", `${name}: reward ${reward.toFixed(3)}${won ? ", higher" : ""}`), marked(text, word));
    return made;
  };
  const list = () => {
    const [left, right] = [Number($("left").value), Number($("right").value)];
    const word = $("search").value.toLowerCase();
    const order = $("order").value;
    const gain = (one) => one.answers[right][1] - one.answers[left][1];
    let found = prompts.filter((one) => one.answers[left] && one.answers[right]);
    if (word) {
      found = found.filter((one) =>
        [one.prompt, one.answers[left][0], one.answers[right][0]].some((text) => text.toLowerCase().includes(word)));
    }
    if (order) found = [...found].sort((a, b) => (order === "win" ? gain(b) - gain(a) : gain(a) - gain(b)));
    $("list").replaceChildren(...found.slice(0, page * 10).map((one) => {
      const made = element("article", undefined, "sample");
      const [a, b] = [one.answers[left], one.answers[right]];
      const sides = element("div", undefined, "sides");
      sides.append(side(models[left], a, a[1] > b[1], word), side(models[right], b, b[1] > a[1], word));
      made.append(element("h4", "Prompt"), marked(one.prompt, word), sides);
      return made;
    }));
    if (!found.length) $("list").append(element("p", prompts.length ? "No answer contains this." : "There are no answers.", "note"));
    $("more").hidden = found.length <= page * 10;
  };
  const again = () => { page = 1; list(); };
  for (const id of ["left", "right", "order"]) $(id).addEventListener("change", again);
  $("search").addEventListener("input", again);
  $("more").addEventListener("click", () => { page += 1; list(); });
  list();

  // Settings of two configurations, those that differ.
  const { labels, keys, values } = data.settings;
  fill($("first"), labels, 0);
  fill($("second"), labels, data.settings.second);
  const differ = () => {
    const [a, b] = [values[$("first").value] ?? [], values[$("second").value] ?? []];
    const rows = keys.flatMap((name, place) => (a[place] === b[place] ? [] : [[name, a[place], b[place]]]));
    $("settings").replaceChildren(...(rows.length ? rows : [["nothing", "", ""]]).map((cells) => {
      const row = element("tr");
      row.append(...cells.map((text) => element("td", text ?? "—", "code")));
      return row;
    }));
  };
  $("first").addEventListener("change", differ);
  $("second").addEventListener("change", differ);
  differ();

  document.querySelectorAll("button.copy").forEach((button) => {
    button.addEventListener("click", async () => {
      const text = button.closest("tr").querySelector("code");
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        // Pages from a file may not write to the clipboard: select, so that a key does it.
        getSelection().selectAllChildren(text);
      }
    });
  });
})();
