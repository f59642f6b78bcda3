"use strict";
// Draws what miniloader/report/matrix_data.py encodes.  Text from the data is only ever set as text, never as markup.
(() => {
  const SAME_AS_BEFORE = -1, SAME_AS_PARTNER = -2, CELL = 16, MOST_ROWS = 40;
  const SHARED = 1, SOLE = 2, COPIED = 3, COPIED_SHARED = 4, ZERO = 5;
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // ------------------------------------------------------------------------------------- small tools
  const $ = (root, selector) => root.querySelector(selector);
  function make(name, properties = {}, ...children) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key in element) element[key] = value; else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }
  function draw(name, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }
  const hex = (number) => "0x" + number.toString(16);
  const plural = (number, what) => `${number.toLocaleString("en")} ${what}${number === 1 ? "" : "s"}`;
  function bytes(number) {
    const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let at = 0;
    while (number >= 1024 && at < units.length - 1) { number /= 1024; at++; }
    return `${Number(number.toPrecision(3)).toLocaleString("en")} ${units[at]}`;
  }
  async function unpack(text) {
    const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).json();
  }
  function expand(runs, into) {
    for (let at = 0, to = 0; at < runs.length; at += 2) { into.fill(runs[at + 1], to, to + runs[at]); to += runs[at]; }
    return into;
  }
  function octets(text) { return Uint8Array.from(atob(text), (c) => c.charCodeAt(0)); }

  // ------------------------------------------------------------------------------------------ colours
  const probe = make("i", { hidden: true, ariaHidden: "true" });
  document.body.append(probe);
  let palette = {};
  function readPalette() {
    const names = ["shared", "empty", "dot", "ink", "soft", "line", "card", "accent", "on", "p0", "p1", "p2", "p3", "p4", "p5", "p6", "p7"];
    palette = Object.fromEntries(names.map((name) => {
      probe.style.color = `var(--${name})`;
      return [name, getComputedStyle(probe).color];
    }));
  }
  const hue = (process) => palette[`p${process % 8}`];

  // -------------------------------------------------------------------------------------- the numbers
  class Data {
    constructor(plain) {
      Object.assign(this, plain);
      this.vaddr = expand(plain.vaddrs, new Float64Array(plain.pages)).map((value, page) => (value + page) * plain.page_size);
      this.columns = [];
      this.groupOf = new Int32Array(plain.pages).fill(-1);
      plain.groups.forEach(([start, stop], group) => {
        for (let page = start; page < stop; page++) { this.columns.push(page); this.groupOf[page] = group; }
      });
      this.decoded = [];
    }
    // One of cells, frames, flags, counts: an array of rows, one a process; decoded when first looked at.
    table(step, name) {
      const known = this.decoded[step] ??= {};
      if (known[name] || !this.scenes[step][name]) return known[name];
      const cells = name === "cells" ? null : this.table(step, "cells"), rows = known[name] = [];
      this.scenes[step][name].forEach((number, row) => {
        const values = expand(this.encoded[number], new Float64Array(this.pages));
        const before = values.includes(SAME_AS_BEFORE) ? this.table(step - 1, name)[row] : null;
        for (let page = 0; page < values.length; page++) {
          if (values[page] === SAME_AS_BEFORE) values[page] = before[page];
          else if (values[page] === SAME_AS_PARTNER) values[page] = rows[(cells[row][page] / CELL | 0) - 2][page];
        }
        rows.push(values);
      });
      return rows;
    }
    state(step, row, page) { return this.table(step, "cells")[row][page] % CELL; }
    // The first process that has the same frame for this page (maybe itself), -1: no frame.
    owner(step, row, page) {
      const code = this.table(step, "cells")[row][page] / CELL | 0;
      return code === 0 ? -1 : code === 1 ? row : code - 2;
    }
    frame(step, row, page) {
      const frames = this.table(step, "frames");
      return frames && frames[row][page] ? frames[row][page] + page - this.pages : 0;
    }
    flagsOf(step, row, page) { const all = this.table(step, "flags"); return all ? this.flags[all[row][page]] : ""; }
    count(step, row, page) { const all = this.table(step, "counts"); return all ? all[row][page] - 1 : -1; }
    holders(step, row, page) {
      const owner = this.owner(step, row, page);
      return owner < 0 ? [] : this.rows.map((_, other) => other).filter((other) => this.owner(step, other, page) === owner);
    }
    address(row, page) { return "0x" + (BigInt("0x" + this.bases[row]) + BigInt(this.vaddr[page])).toString(16); }
    // What one cell looks like: its colour is the frame's, its sign says the same without colour.
    look(step, row, page) {
      const state = this.state(step, row, page), owner = this.owner(step, row, page);
      if (state !== SHARED && state !== SOLE) return { state, owner, colour: owner < 0 ? palette.soft : hue(owner) };
      const others = new Set();  // several file frames in one column: told apart, too
      for (let other = 0; other < row; other++) {
        const known = this.state(step, other, page);
        if (known === SHARED || known === SOLE) others.add(this.owner(step, other, page));
      }
      others.delete(owner);
      return { state, owner, colour: others.size && owner > 0 ? hue(owner) : palette.shared, other: others.size > 0 };
    }
  }

  // ------------------------------------------------------------------------------------------- cells
  function paintCell(to, look, x, y, width, height, quiet = false) {
    const gap = width > 6 ? 1 : 0, right = width - gap, low = height - (height > 6 ? 1 : 0);
    const sign = (text, colour) => {
      if (quiet || width < 11 || height < 11) return;
      to.fillStyle = colour;
      to.font = `700 ${Math.min(13, height - 4, (width - 3) * (text.length > 1 ? 0.8 : 1))}px system-ui, sans-serif`;
      to.textAlign = "center"; to.textBaseline = "middle";
      to.fillText(text, x + right / 2, y + low / 2 + 0.5);
    };
    const box = (colour) => { to.fillStyle = colour; to.beginPath(); to.roundRect(x, y, right, low, Math.min(3, width / 5)); to.fill(); };
    switch (look.state) {
      case 0:
        box(palette.empty);
        to.fillStyle = palette.dot; to.beginPath(); to.arc(x + right / 2, y + low / 2, Math.min(1.6, width / 5), 0, 7); to.fill();
        break;
      case SHARED:
        box(look.colour);
        if (look.other) sign(String(look.owner + 1), palette.on);
        break;
      case SOLE: {
        box(palette.empty);
        to.save(); to.beginPath(); to.rect(x, y, right, low); to.clip();
        to.strokeStyle = look.colour; to.lineWidth = 2; to.beginPath();
        for (let at = -low; at < right; at += 5) { to.moveTo(x + at, y + low); to.lineTo(x + at + low, y); }
        to.stroke(); to.strokeRect(x + 1, y + 1, right - 2, low - 2); to.restore();
        break;
      }
      case COPIED:  // a cut corner and the owner's number
        box(look.colour);
        if (right >= 5) {
          to.fillStyle = palette.card; to.beginPath(); to.moveTo(x + right - Math.min(6, right / 2), y);
          to.lineTo(x + right, y); to.lineTo(x + right, y + Math.min(6, low / 2)); to.fill();
        }
        sign(String(look.owner + 1), palette.on);
        break;
      case COPIED_SHARED:
        box(look.colour);
        to.fillStyle = palette.card; to.fillRect(x + right * 0.22, y + low * 0.2, right * 0.56, low * 0.6);
        sign(look.owner < 0 ? "◇" : String(look.owner + 1), palette.ink);
        break;
      default:
        box(palette.empty);
        to.strokeStyle = palette.soft; to.lineWidth = 1; to.setLineDash([2, 2]); to.strokeRect(x + 0.5, y + 0.5, right - 1, low - 1); to.setLineDash([]);
        sign(look.state === ZERO ? "0" : look.state === 6 ? "~" : look.state === 7 ? "!" : "?", palette.ink);
    }
  }
  function prepare(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const to = canvas.getContext("2d");
    to.setTransform(ratio, 0, 0, ratio, 0, 0);
    return to;
  }

  // -------------------------------------------------------------------------------------- one matrix
  class Film {
    constructor(figure, data) {
      this.figure = figure; this.data = data;
      this.step = data.at; this.before = null; this.progress = 1;
      this.row = 0; this.column = this.firstCopy(); this.from = null; this.opened = null;
      this.stage = $(figure, ".stage"); this.canvas = $(figure, ".matrix"); this.over = $(figure, ".overview");
      this.slider = $(figure, "input"); this.linkAt = null;
      $(figure, ".live").hidden = false;
      this.listen();
      this.resize();
    }
    get page() { return this.data.columns[this.column]; }
    // What a page is called: its number, where a mapping's pages are counted; where it lies, in a library.
    get counted() { const { groups } = this.data; return groups.length === 1 && groups[0][2] === "pages"; }
    named(page) { return this.counted ? `page ${page}` : `page ${hex(this.data.vaddr[page])}`; }
    // What to show first: a copied page, else one that is there.
    firstCopy() {
      const { data } = this, rows = [...data.rows.keys()];
      if (this.figure.classList.contains("compact") && data.scenes.length > 1) {  // before and after: what changes between
        const last = data.scenes.length - 1, differs = (row, page) =>
          data.state(data.at, row, page) !== data.state(last, row, page) || data.owner(data.at, row, page) !== data.owner(last, row, page);
        const column = data.columns.findIndex((page) => rows.some((row) => differs(row, page)));
        if (column >= 0) return column;
      }
      const first = (wanted) => data.columns.findIndex((page) => rows.some((row) => wanted(data.state(data.at, row, page))));
      const found = first((state) => state === COPIED || state === COPIED_SHARED);
      if (found >= 0) return found;
      const last = data.scenes.length - 1;  // what will be copied, else what is there
      const later = data.columns.findIndex((page) => rows.some((row) => [COPIED, COPIED_SHARED].includes(data.state(last, row, page))));
      return Math.max(later < 0 ? first((state) => state !== 0) : later, 0);
    }
    listen() {
      this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
      $(this.figure, ".play").addEventListener("click", () => this.play());
      this.canvas.addEventListener("pointermove", (event) => this.point(event, false));
      this.canvas.addEventListener("click", (event) => this.point(event, true));
      this.stage.addEventListener("keydown", (event) => this.key(event));
      this.stage.addEventListener("focus", () => this.paint());
      this.stage.addEventListener("blur", () => this.paint());
      const slide = (event) => {
        if (event.type !== "pointerdown" && !event.buttons) return;
        const column = this.columnAtOverview(event.offsetX);
        this.from = Math.round(column - this.shown / 2); this.column = column; this.clamp(false); this.update();
      };
      this.over.addEventListener("pointerdown", slide); this.over.addEventListener("pointermove", slide);
      new ResizeObserver(() => { if (this.figure.clientWidth !== this.known) this.resize(); }).observe(this.figure);
    }
    // ---- where things are
    resize() {
      this.known = this.figure.clientWidth;
      const { data } = this, total = data.columns.length;
      this.width = this.stage.clientWidth;
      this.gutter = this.width < 300 && total * 14 > this.width - 84 ? 24 : 84;  // numbers for names, where room is short
      const room = this.width - this.gutter - (data.groups.length - 1) * 7 - 2;
      this.cell = Math.min(34, Math.floor(room / Math.max(total, 1)));
      this.whole = this.cell >= 9;
      if (!this.whole) this.cell = this.width < 500 ? 13 : 15;
      this.shown = this.whole ? total : Math.max(4, Math.floor(room / this.cell));
      const count = data.rows.length;
      this.height = count <= 8 ? 26 : count <= 16 ? 20 : count <= 32 ? 14 : 8;
      this.from ??= this.column - (this.shown >> 1);
      this.clamp(true);
      this.over.hidden = this.whole; this.over.style.display = this.whole ? "none" : "block";
      this.update();
    }
    clamp(follow) {
      const total = this.data.columns.length;
      this.column = Math.max(0, Math.min(total - 1, this.column));
      this.row = Math.max(0, Math.min(this.data.rows.length - 1, this.row));
      if (follow && this.column < this.from) this.from = this.column;
      if (follow && this.column >= this.from + this.shown) this.from = this.column - this.shown + 1;
      this.from = Math.max(0, Math.min(total - this.shown, this.from));
    }
    x(column) {
      const { data } = this, group = (at) => data.groupOf[data.columns[at]];
      return this.gutter + (column - this.from) * this.cell + (group(column) - group(this.from)) * 7;
    }
    cellAt(event) {
      const last = Math.min(this.from + this.shown, this.data.columns.length) - 1;
      let column = this.from;
      while (column < last && this.x(column + 1) <= event.offsetX) column++;
      const row = Math.floor((event.offsetY - 30) / this.height);
      return event.offsetX < this.gutter || row < 0 || row >= this.data.rows.length ? null : { row, column };
    }
    // ---- what the reader does
    point(event, click) {
      const found = this.cellAt(event);
      if (!found) return;
      if (found.row !== this.row || found.column !== this.column) { this.row = found.row; this.column = found.column; this.update(); }
      if (click) this.open();
    }
    key(event) {
      const jump = this.shown - 1, total = this.data.columns.length;
      const moves = {
        ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
        PageUp: [0, -jump], PageDown: [0, jump], Home: [0, -total], End: [0, total],
      };
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.key in moves) {
        this.row += moves[event.key][0]; this.column += moves[event.key][1]; this.clamp(true); this.update();
      } else if (event.key === "Enter" || event.key === " ") this.open();
      else if (event.key === "," || event.key === ".") this.go(this.step + (event.key === "." ? 1 : -1));
      else return;
      event.preventDefault();
    }
    go(step) {
      step = Math.max(0, Math.min(this.data.scenes.length - 1, step));
      if (step === this.step) return;
      this.before = this.step; this.step = step; this.slider.value = step;
      this.animate();
      this.update();
    }
    animate() {
      if (still.matches) { this.progress = 1; return; }
      const began = performance.now(), mine = this.ticket = {};
      const tick = (now) => {
        if (this.ticket !== mine) return;
        this.progress = Math.min(1, Math.max(0, (now - began) / 450));
        this.paint(); this.links();
        if (this.progress < 1) requestAnimationFrame(tick);
      };
      this.progress = 0;
      requestAnimationFrame(tick);
    }
    play() {
      const button = $(this.figure, ".play");
      if (this.playing) { clearInterval(this.playing); this.playing = null; button.textContent = "▶ Play"; return; }
      if (this.step === this.data.scenes.length - 1) this.go(0);
      button.textContent = "❚❚ Pause";
      this.playing = setInterval(() => {
        this.go(this.step + 1);
        if (this.step === this.data.scenes.length - 1) this.play();
      }, 1600);
    }
    // ---- drawing
    update() { this.paint(); this.overview(); this.tell(); this.links(); this.map(); this.showBytes(); }
    paint() {
      const { data, step } = this, rows = data.rows.length, bottom = 30 + rows * this.height;
      const to = prepare(this.canvas, this.width, bottom + 18);
      const last = Math.min(this.from + this.shown, data.columns.length);
      to.textBaseline = "middle";
      data.rows.forEach((name, row) => {
        to.fillStyle = row === this.row ? palette.accent : palette.ink; to.textAlign = "left";
        to.font = `${row === this.row ? 700 : 400} ${Math.min(13, this.height - 1)}px system-ui, sans-serif`;
        const label = this.gutter < 50 ? String(row + 1) : name;
        if (this.height >= 11) to.fillText(label, 0, 30 + row * this.height + this.height / 2, this.gutter - 6);
      });
      let group = -1;
      for (let column = this.from; column < last; column++) {
        const page = data.columns[column], x = this.x(column);
        if (data.groupOf[page] !== group) { group = data.groupOf[page]; this.heading(to, group, x, column, last, bottom); }
        for (let row = 0; row < rows; row++) {
          const y = 30 + row * this.height, look = data.look(step, row, page);
          const quiet = this.cell < 18 && column % 4 > 0 && column !== this.column;  // small cells: a number now and then
          const old = this.progress < 1 ? data.look(this.before, row, page) : look;
          if (old.state === look.state && old.owner === look.owner) { paintCell(to, look, x, y, this.cell, this.height, quiet); continue; }
          paintCell(to, old, x, y, this.cell, this.height, quiet);
          const part = this.progress;
          to.globalAlpha = part;
          paintCell(to, look, x + this.cell * (1 - part) / 2, y + this.height * (1 - part) / 2, this.cell * part, this.height * part, quiet);
          to.globalAlpha = 1;
        }
      }
      if (this.column >= this.from && this.column < last) {
        to.strokeStyle = palette.ink; to.lineWidth = document.activeElement === this.stage ? 3 : 2;
        to.strokeRect(this.x(this.column) - 1.5, 30 + this.row * this.height - 1.5, this.cell + 2, this.height + 2);
      }
    }
    heading(to, group, x, column, last, bottom) {
      const { data } = this, [start, stop, name] = data.groups[group];
      const end = Math.min(column + data.columns.slice(column, column + stop - start).filter((page) => page < stop).length, last);
      const width = (end - column) * this.cell - 2;
      to.fillStyle = palette.soft; to.fillRect(x, 24, Math.max(width, 2), 2);
      to.textAlign = "left"; to.textBaseline = "middle"; to.fillStyle = palette.ink;
      const fits = (text, size) => { to.font = `${size}px ui-monospace, "DejaVu Sans Mono", monospace`; return to.measureText(text).width <= width + 4; };
      const short = name.slice(0, 3);
      if (fits(name, 12)) to.fillText(name, x, 13);
      else if (fits(short, 12) || fits(short, 10)) to.fillText(short, x, 13);
      to.fillStyle = palette.soft;
      const address = this.counted ? String(data.columns[column]) : hex(data.vaddr[data.columns[column]]);
      if (fits(address, 11)) to.fillText(address, x, bottom + 11);
    }
    // The whole of it: every group on its own scale, so that a group of one page is seen beside 20,000.
    spans() {
      const { data } = this, weights = data.groups.map(([start, stop]) => Math.sqrt(stop - start));
      const sum = weights.reduce((one, other) => one + other, 0), room = this.width - this.gutter - 7 * (weights.length - 1);
      const least = Math.min(22, room / weights.length / 2), spare = room - least * weights.length;
      let x = this.gutter, column = 0;
      return data.groups.map(([start, stop], group) => {
        const width = least + spare * weights[group] / sum, span = { x, width, column, pages: stop - start };
        x += width + 7; column += stop - start;
        return span;
      });
    }
    columnAtOverview(x) {
      const spans = this.spans(), span = spans.findLast((one) => one.x <= x) ?? spans[0];
      return span.column + Math.min(span.pages - 1, Math.max(0, Math.floor((x - span.x) / span.width * span.pages)));
    }
    xAtOverview(column) {
      const span = this.spans().findLast((one) => one.column <= column);
      return span.x + (column - span.column) / span.pages * span.width;
    }
    overview() {
      const scale = $(this.figure, ".scale"), { data } = this;
      const numbers = this.gutter < 50 ? ` Rows: ${list(data.rows.map((name, row) => `${row + 1} is ${name}`))}.` : "";
      if (this.whole) {
        scale.textContent = ((data.groups.length > 1 ? "All pages are shown, one cell each; gaps between mappings are left out." : "") + numbers).trim();
        return;
      }
      const rows = data.rows.length, height = Math.max(2, Math.min(9, Math.floor(110 / rows)));
      const to = prepare(this.over, this.width, rows * height + 24), spans = this.spans();
      const rank = [0, 2, 1, 4, 3, 0.5, 5, 6, 5], cells = data.table(this.step, "cells");  // what is shown where several pages fall on one pixel
      for (const [group, span] of spans.entries()) {
        to.fillStyle = palette.ink; to.font = '11px ui-monospace, "DejaVu Sans Mono", monospace'; to.textBaseline = "middle"; to.textAlign = "left";
        const name = data.groups[group][2];
        to.fillText(to.measureText(name).width <= span.width + 1 ? name : name.slice(0, 3), span.x, 7);
        const pixels = Math.ceil(span.width);
        for (let row = 0; row < rows; row++) {
          for (let at = 0; at < pixels; at++) {
            const first = span.column + Math.floor(at * span.pages / pixels), after = span.column + Math.max(Math.floor((at + 1) * span.pages / pixels), Math.floor(at * span.pages / pixels) + 1);
            let best = data.columns[first];
            for (let column = first + 1; column < after; column++) {
              const page = data.columns[column];
              if (rank[cells[row][page] % CELL] > rank[cells[row][best] % CELL]) best = page;
            }
            const look = data.look(this.step, row, best);
            to.fillStyle = look.state === 0 ? palette.empty : look.colour;
            to.fillRect(span.x + at, 16 + row * height, Math.min(1, span.width - at), height - (height > 4 ? 1 : 0));
          }
        }
      }
      to.strokeStyle = palette.ink; to.lineWidth = 2;
      const left = this.xAtOverview(this.from), right = this.xAtOverview(Math.min(this.from + this.shown, data.columns.length) - 1);
      to.strokeRect(left - 2, 14, Math.max(right - left + 4, 5), rows * height + 4);
      scale.textContent = `Above, all ${plural(data.columns.length, "page")}${spans.length < 2 ? "" : `, each group on its own scale (${
        spans.map((span, group) => `${data.groups[group][2]}: ${plural(span.pages, "page")}`).join(", ")})`}; below, ${this.shown} of them, from ${this.named(data.columns[this.from])}.${numbers}`;
    }
    // ---- words
    tell() {
      const { data, step, row, page } = this, scene = data.scenes[step], figure = this.figure;
      $(figure, ".step-name").textContent = data.scenes.length > 1 ? `${step + 1} of ${data.scenes.length}: ${scene.name}` : scene.name;
      $(figure, ".step-about").textContent = scene.about;
      this.slider.setAttribute("aria-valuetext", `${scene.name}: ${scene.about}`);
      [...$(figure, ".ticks").children].forEach((tick, at) => tick.classList.toggle("on", at === step));
      this.use(scene);
      const [name, sign, help] = data.states[data.state(step, row, page)], frame = data.frame(step, row, page);
      const holders = data.holders(step, row, page), others = holders.filter((other) => other !== row).map((other) => data.rows[other]);
      const told = frame ? `frame ${hex(frame)}` : holders.length ? "a frame (its number is not told)" : "no frame";
      const ranges = data.ranges.filter(([start, stop]) => start <= page && page < stop);
      const flags = data.flagsOf(step, row, page), count = data.count(step, row, page);
      $(figure, ".facts-title").textContent = `Page ${hex(data.vaddr[page])} in ${data.rows[row]}`;
      const facts = [
        ["state", `${sign} ${name}: ${help}`],
        ["frame", told + (others.length ? `, the same in ${list(others)}` : holders.length ? ", in no other of these processes" : "")],
        ["address", `${data.address(row, page)} in pid ${data.pids[row]}`],
      ];
      if (step > 0 && data.scenes.length > 1) {
        const old = data.frame(step - 1, row, page), was = data.states[data.state(step - 1, row, page)][0];
        facts.push(["step before", old ? `${was}, frame ${hex(old)}${old === frame ? " (the same)" : ""}` : was]);
      }
      if (flags) facts.push(["flags", flags]);
      if (count >= 0) facts.push(["mapped", plural(count, "time") + " over all processes"]);
      const mapping = this.mapping(row, page);
      if (mapping) facts.push(["mapping", `${mapping[2]} ${mapping[4]}`]);
      if (scene.reasons[row]) facts.push(["not seen", scene.reasons[row]]);
      const headings = [...new Set(ranges.map((one) => one[2]))];
      for (const heading of headings) facts.push([heading, ranges.filter((one) => one[2] === heading).map((one) => one[3]).join("; ")]);
      if (data.about[page]) facts.push(["bytes", "click the cell, or press Enter"]);
      $(figure, ".facts dl").replaceChildren(...facts.map(([key, value]) => make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: value }))));
      const cause = ranges.find((one) => one[2] === "cause");
      const copied = [COPIED, COPIED_SHARED].includes(data.state(step, row, page));
      $(figure, ".said").textContent = `${data.rows[row]}, ${this.named(page)}: ${name}, ${told}` +
        (others.length ? `, shared with ${list(others)}` : "") + (copied && cause ? `; ${cause[3]}` : "");
    }
    mapping(row, page) {
      const { data } = this, vaddr = BigInt(data.vaddr[page]);
      const all = data.mappings[data.scenes[this.step].maps[row]] ?? [];
      return all.find(([start, end]) => signed(start) <= vaddr && vaddr < signed(end));
    }
    use(scene) {
      $(this.figure, ".use").hidden = this.data.rows.length < 2;  // nobody to share with
      const most = Math.max(...this.data.scenes.map((one) => one.unshared), 1);
      const bar = (name, kind, value) => {
        const svg = draw("svg", { role: "img", "aria-label": `${name}: ${bytes(value)}`, viewBox: "0 0 100 10", preserveAspectRatio: "none" });
        svg.append(draw("rect", { class: "track", width: 100, height: 10 }), draw("rect", { class: kind, width: value / most * 100, height: 10, "vector-effect": "non-scaling-stroke" }));
        return make("div", {}, make("span", { textContent: `${name}: ${bytes(value)}` }), svg);
      };
      $(this.figure, ".use").replaceChildren(bar("memory in use", "real", scene.used), bar("without sharing", "alone", scene.unshared));
    }
    // Page table entries on the left, frames on the right: an arrow for each process.
    links() {
      const { data, step, page } = this, svg = $(this.figure, ".links svg"), count = data.rows.length;
      const width = svg.clientWidth || 320, high = count > 10 ? 19 : 30, owners = [];
      const owner = data.rows.map((_, row) => data.owner(step, row, page));
      for (const one of owner) if (one >= 0 && !owners.includes(one)) owners.push(one);
      const spread = (at, of) => of <= 1 ? count * high / 2 : high / 2 + at * (count - 1) * high / (of - 1);
      const frameY = (one) => spread(owners.indexOf(one), owners.length);
      const goal = owner.map((one, row) => one < 0 ? high / 2 + row * high : frameY(one));
      const from = this.progress < 1 && this.linkAt && this.linkAt.page === page ? this.linkAt.goal : goal;
      if (this.progress === 1) this.linkAt = { page, goal };
      const ease = 1 - (1 - this.progress) ** 3, left = 104, right = Math.max(width - 176, 150), parts = [];
      svg.setAttribute("height", count * high + 4);
      data.rows.forEach((name, row) => {
        const y = high / 2 + row * high, look = data.look(step, row, page), to = from[row] + (goal[row] - from[row]) * ease, none = owner[row] < 0;
        const end = none ? left + 26 : right - 9;
        parts.push(draw("text", { x: 0, y: y + 4, class: row === this.row ? "" : "dim" }, name.length > 14 ? name.slice(0, 13) + "…" : name));
        parts.push(draw("path", { d: `M${left} ${y} C${(left + end) / 2} ${y} ${(left + end) / 2} ${to} ${end} ${to}`, stroke: none ? palette.dot : look.colour, "stroke-dasharray": none ? "2 4" : "", opacity: row === this.row ? 1 : 0.75 }));
        if (none) parts.push(draw("text", { x: end + 6, y: to + 4, class: "dim" }, data.states[look.state][0]));
        else parts.push(draw("path", { d: `M${end - 6} ${to - 4.5} L${end + 1} ${to} L${end - 6} ${to + 4.5}`, stroke: look.colour }));
      });
      for (const one of owners) {
        const y = frameY(one), frame = data.frame(step, one, page), look = data.look(step, one, page), tall = Math.min(24, high - 3);
        const kind = look.state === SHARED || look.state === SOLE ? "the file’s page" : look.state === ZERO ? "zeros" : "a copy";
        parts.push(draw("rect", { x: right - 6, y: y - tall / 2, width: width - right + 4, height: tall, rx: 4, stroke: look.colour, "stroke-dasharray": kind === "a copy" ? "5 2" : "" }));
        parts.push(draw("text", { x: right + 2, y: y + 4, class: tall < 20 ? "dim" : "" }, frame && width < 340 ? hex(frame) : (frame ? `${hex(frame)} ` : "") + kind));
      }
      svg.replaceChildren(...parts);
    }
    map() {
      const { data, step } = this, scene = data.scenes[step], section = $(this.figure, ".map");
      const layouts = [...new Set(scene.maps)].filter((one) => data.mappings[one].length);
      section.hidden = !layouts.length;
      $(section, "div").replaceChildren(...layouts.flatMap((layout) => {
        const who = data.rows.map((_, row) => row).filter((row) => scene.maps[row] === layout);
        const line = make("p", { className: "who" });
        who.slice(0, 6).forEach((row, at) => line.append(at ? ", " : "", data.rows[row], " at ", make("span", { className: "mono", textContent: "0x" + data.bases[row] })));
        if (who.length > 6) line.append(` and ${who.length - 6} more`);
        const items = make("ul");
        let end = null;
        for (const [start, stop, protection, kind, name] of data.mappings[layout]) {
          const pages = Number(signed(stop) - signed(start)) / data.page_size, hole = end === null ? 0 : Number(signed(start) - end) / data.page_size;
          if (hole > 0) items.append(make("li", { className: "gap", textContent: `⋯ ${plural(hole, "page")}` }));
          const item = make("li", { className: [kind, protection.includes("x") ? "x" : "", protection.includes("w") ? "w" : ""].join(" ") },
            make("b", { textContent: `${protection} ${plural(pages, "page")}` }), `${shown(start)} ${name.split("/").pop()}`);
          item.style.flexGrow = Math.sqrt(pages);
          items.append(item);
          end = signed(stop);
        }
        return [line, items];
      }));
    }
    // ---- bytes
    open() {
      this.opened = this.page; this.everything = false; this.showBytes();
      const section = $(this.figure, ".bytes");
      if (section.getBoundingClientRect().top > innerHeight - 80) section.scrollIntoView({ block: "nearest", behavior: still.matches ? "auto" : "smooth" });
    }
    showBytes() {
      const section = $(this.figure, ".bytes"), { data } = this, page = this.opened;
      section.hidden = page === null;
      if (page === null) return;
      const about = data.about[page], title = make("h3", { textContent: `The bytes of page ${hex(data.vaddr[page])}` });
      if (!about) {
        const kept = Object.keys(data.about).length;
        section.replaceChildren(title, make("p", { textContent: data.look(this.step, this.row, page).state === SHARED
          ? "They are as in the file: the page is the file’s own, one copy for all."
          : kept ? `Not kept in this file: only the first ${plural(kept, "copied page")} are.`
          : "Not kept in this file: what the experiment wrote is shown with its step." }));
        return;
      }
      const names = data.scenes.map((one) => one.name);
      const told = Object.keys(about.after).filter((name) => names.indexOf(name) <= this.step).pop();
      const rows = told === undefined ? [] : about.after[told];
      const process = Math.min(this.row, Math.max(rows.length - 1, 0)), words = rows[process];
      const which = make("div", { className: "which" }, told === undefined
        ? `At step “${names[this.step]}” nothing has been written here: the bytes are those of the file.`
        : `As step “${told}” left them in`);
      rows.forEach((_, row) => {
        const button = make("button", { type: "button", textContent: data.rows[row], ariaPressed: String(row === process) });
        button.addEventListener("click", () => { this.row = row; this.update(); });
        which.append(button);
      });
      const changed = new Map((words ?? []).map(([offset, value]) => [offset, value]));
      which.append(words === null ? "could not be read" : told === undefined ? "" : `${plural(changed.size, "word")} of ${data.page_size / 8} differ from the file`);
      const all = make("button", { type: "button", textContent: this.everything ? "Only what differs" : "Show the whole page" });
      all.addEventListener("click", () => { this.everything = !this.everything; this.showBytes(); });
      which.append(all);
      section.replaceChildren(title, which, make("div", { className: "scroll", tabIndex: 0, role: "group", ariaLabel: "Bytes before and after" }, this.dump(page, about, changed)));
    }
    dump(page, about, changed) {
      const { data } = this, before = octets(about.before), body = make("tbody");
      const words = (row, after) => {
        const cell = make("td", { className: "octets" });
        cell.dataset.what = after ? "after" : "before";
        for (const offset of [row, row + 8]) {
          const was = [...before.slice(offset, offset + 8)].map((one) => one.toString(16).padStart(2, "0")).join(" ");
          const text = after && changed.has(offset) ? changed.get(offset).replace(/(..)(?=.)/g, "$1 ") : was;
          cell.append(offset > row ? " " : "", make(changed.has(offset) ? "mark" : "span", { className: "word", textContent: text }));
        }
        return cell;
      };
      let skipped = 0, more = 0;
      const flush = () => { if (skipped) body.append(make("tr", { className: "skipped" }, make("td", { colSpan: 4, textContent: `⋯ ${plural(skipped * 16, "byte")} as in the file` }))); skipped = 0; };
      for (let row = 0; row < before.length; row += 16) {
        const differ = [row, row + 8].filter((offset) => changed.has(offset));
        if (!differ.length && !this.everything) { skipped++; continue; }
        if (!this.everything && body.children.length >= MOST_ROWS) { more++; continue; }
        flush();
        body.append(make("tr", {}, make("th", { scope: "row", textContent: hex(data.vaddr[page] + row) }), words(row, false), words(row, true),
          make("td", { className: "name", textContent: differ.map((offset) => about.names[offset] ?? "").join("; ") })));
      }
      if (!more) flush();
      if (more) body.append(make("tr", { className: "skipped" }, make("td", { colSpan: 4, textContent: `and ${plural(more, "more row")} that differ: show the whole page` })));
      const head = make("tr", {}, ...["vaddr", "in the file", "in memory", "what changed it"].map((text) => make("th", { scope: "col", textContent: text })));
      return make("table", {}, make("thead", {}, head), body);
    }
    // Whose frame a cell of ``state`` has, in this matrix: so the legend has a sign that is in it.
    ownerOf(state) {
      const { data } = this;
      for (const step of [data.at, data.scenes.length - 1]) {
        for (const row of data.rows.keys()) {
          const page = data.columns.find((column) => data.state(step, row, column) === state);
          if (page !== undefined) return data.owner(step, row, page);
        }
      }
      return -1;
    }
    legend() {
      const { data } = this;
      $(this.figure, ".legend").replaceChildren(...data.legend.map((state) => {
        const canvas = make("canvas", { ariaHidden: "true" });
        const item = make("li", {}, canvas, make("span", { textContent: `${data.states[state][0]}: ${data.states[state][2]}` }));
        const owner = state === COPIED || state === COPIED_SHARED ? this.ownerOf(state) : -1;
        paintCell(prepare(canvas, 20, 20), { state, owner, colour: owner < 0 ? palette.shared : hue(owner) }, 0, 0, 20, 20);
        return item;
      }));
    }
  }
  const list = (names) => names.length <= 4 ? names.join(", ") : `${names.slice(0, 3).join(", ")} and ${names.length - 3} more`;
  const signed = (text) => text.startsWith("-") ? -BigInt("0x" + text.slice(1)) : BigInt("0x" + text);
  const shown = (text) => text.startsWith("-") ? "-0x" + text.slice(1) : "0x" + text;

  // -------------------------------------------------------------------------------------- the page
  const films = [];
  const repaint = () => { readPalette(); for (const film of films) { film.update(); film.legend(); } };
  const theme = $(document, ".theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
  const label = () => { theme.textContent = isDark() ? "☀ Light" : "☾ Dark"; };
  theme.hidden = false;
  label();
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; label(); repaint(); });
  dark.addEventListener("change", () => { label(); repaint(); });
  matchMedia("print").addEventListener("change", repaint);
  addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details:not(.more)")) one.open = true; });
  readPalette();

  // --------------------------------------------------------------------------------------- the course
  // A chapter at a time, by the address; in it each step keeps what was seen until its question is answered.
  class Course {
    constructor(root) {
      this.root = root;
      this.chapters = [...root.querySelectorAll(".chapter")];
      this.contents = $(root, ".contents details");
      $(root, ".keys").hidden = false;
      for (const step of root.querySelectorAll(".step")) this.gate(step);
      $(root, ".reveal-all").addEventListener("click", () => this.revealAll());
      addEventListener("beforeprint", () => { this.printAll(); });
      addEventListener("afterprint", () => this.show());
      addEventListener("hashchange", () => this.show(true));
      document.addEventListener("keydown", (event) => this.key(event));
      if (innerWidth < 992) this.contents.open = false;
      this.show();
    }
    gate(step) {
      const reveal = $(step, ".reveal");
      if (!reveal) return;
      reveal.hidden = false;
      $(step, ".outcome").hidden = true;
      const slider = $(step, ".film input");
      if (slider && slider.max === "0") $(step, ".film").hidden = true;  // it has no state before
      $(reveal, "button").addEventListener("click", () => this.reveal(step));
      for (const choice of step.querySelectorAll(".choice")) choice.addEventListener("toggle", () => { if (choice.open) this.reveal(step); });
    }
    reveal(step) {
      const reveal = $(step, ".reveal"), figure = $(step, ".film"), film = figure?.film;
      if (reveal) reveal.hidden = true;
      if (figure) figure.hidden = false;
      $(step, ".outcome").hidden = false;
      if (film) film.go(film.data.scenes.length - 1);
    }
    printAll() {  // a matrix that was hidden knows no width yet
      this.revealAll();
      for (const chapter of this.chapters) chapter.hidden = false;
      for (const film of films) film.resize();
    }
    revealAll() { for (const step of this.root.querySelectorAll(".step")) this.reveal(step); }
    // The chapter that the address names, or that has what it names; the first where it names nothing.
    show(moved = false) {
      const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
      const chapter = target?.closest(".chapter") ?? this.chapters[0];
      this.current = this.chapters.indexOf(chapter);
      for (const other of this.chapters) other.hidden = other !== chapter;
      $(this.root, ".cover").classList.toggle("later", this.current > 0);
      for (const item of this.root.querySelectorAll("[data-chapter]")) {
        const here = item.dataset.chapter === chapter.id;
        item.classList.toggle("here", here);
        if (here) $(item, "a").setAttribute("aria-current", "true"); else $(item, "a").removeAttribute("aria-current");
      }
      if (!moved) { if (target && target !== chapter) target.scrollIntoView(); return; }
      if (innerWidth < 992) this.contents.open = false;
      if (target && target !== chapter) target.scrollIntoView();
      else { scrollTo(0, 0); $(chapter, "h2").focus({ preventScroll: true }); }
    }
    turn(by) {
      const next = this.chapters[this.current + by];
      if (next) location.hash = next.id;
    }
    key(event) {
      if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("input, [role='application']")) return;
      if (event.key === "n") this.turn(1);
      else if (event.key === "p") this.turn(-1);
      else if (event.key === "?") location.hash = "words";
    }
  }

  // One after the other, so that the first can be used while the others are still unpacked.
  async function start() {
    for (const figure of document.querySelectorAll(".film")) {
      const film = new Film(figure, new Data(await unpack($(figure, ".data").textContent)));
      film.legend();
      films.push(film);
      figure.film = film;  // for whoever has a look from the console, and for the tests
      figure.dataset.ready = "true";
      const step = figure.closest(".step");
      if (step && !$(step, ".outcome").hidden) film.go(film.data.scenes.length - 1);
      await new Promise((resume) => setTimeout(resume));
    }
    document.documentElement.dataset.ready = "true";
  }
  const course = $(document, ".course");
  if (course) new Course(course);
  start();
})();
