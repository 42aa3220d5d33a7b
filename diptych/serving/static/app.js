// The page: it asks the server's HTTP API and nothing else.
const $ = (selector, within = document) => within.querySelector(selector);
const make = (tag, props = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), props);
  made.append(...children);
  return made;
};
const keep = localStorage, session = sessionStorage;

// ---- the server ------------------------------------------------------------------------------------------------
function notice(text) { const n = $("#notice"); n.textContent = text; n.hidden = !text; }

const plain = message => message.replace(/^picture '[^']*'/, "The picture"); // people do not know the paths of JSON

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = session.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  if (options.json) { options = { ...options, method: "POST", body: JSON.stringify(options.json) }; headers["content-type"] = "application/json"; }
  let answer;
  try { answer = await fetch(path, { ...options, headers }); } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (answer.status === 401) $("#key").hidden = false;
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    const wait = answer.headers.get("retry-after");
    throw new Error(plain(told.error?.message ?? `The server answered ${answer.status}.`) + (wait ? ` (in ${wait} s)` : ""));
  }
  const shape = answer.headers.get("warning")?.match(/"([^"]*aspect ratio[^"]*)"/);
  if (shape) notice(shape[1][0].toUpperCase() + shape[1].slice(1) + ".");
  return answer;
}

async function* stream(path, options) {
  const answer = await ask(path, options), reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { done, value } = await reader.read().catch(error => { throw error.name === "AbortError" ? error : new Error("The connection to the server was lost."); });
    if (done) return;
    const events = (held + value).split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(l => l.startsWith("data: ")).map(l => l.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const row = JSON.parse(data);
      if (row.error) throw new Error(plain(row.error.message));
      yield row;
    }
  }
}

// ---- pictures that people bring --------------------------------------------------------------------------------
const SIDE = 2048, BYTES = 4 * 2 ** 20; // larger photographs are reduced before they are sent
const uri = (file, name) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result);
  reader.onerror = () => failed(new Error(`${name} cannot be read.`));
  reader.readAsDataURL(file);
});
async function read(file) { // File -> data URI, once it is known to be a picture
  const image = await createImageBitmap(file).catch(() => { throw new Error(`${file.name} is damaged, or a picture that this browser cannot read. Use PNG, JPEG, WebP or GIF.`); });
  const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
  if (scale === 1 && file.size <= BYTES) { image.close(); return uri(file, file.name); }
  const canvas = make("canvas", { width: Math.max(1, Math.round(image.width * scale)), height: Math.max(1, Math.round(image.height * scale)) });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff"; pen.fillRect(0, 0, canvas.width, canvas.height); // as the server lays transparency on white
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return uri(await new Promise(done => canvas.toBlob(done, "image/jpeg", 0.92)), file.name);
}
function blob(uri) { // data URI -> Blob, without asking the network (the page's policy forbids it)
  const [head, body] = uri.split(","), bytes = Uint8Array.from(atob(body), c => c.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}
function pictures(list) { // those of the files that are pictures; the others are named
  const files = [...(list ?? [])], others = files.filter(f => !f.type.startsWith("image/")).map(f => f.name);
  if (others.length) notice(`${others.join(", ")}: not a picture. Use PNG, JPEG, WebP or GIF.`);
  return files.filter(f => f.type.startsWith("image/"));
}

function bring(zone, input, take) { // choose, drop or paste
  input.addEventListener("change", () => { notice(""); take(pictures(input.files)); input.value = ""; });
  for (const kind of ["dragover", "dragenter"]) zone.addEventListener(kind, e => { e.preventDefault(); zone.classList.add("dropping"); });
  for (const kind of ["dragleave", "drop"]) zone.addEventListener(kind, () => zone.classList.remove("dropping"));
  zone.addEventListener("drop", e => { e.preventDefault(); take(pictures(e.dataTransfer.files)); });
  document.addEventListener("paste", e => {
    if (!zone.offsetParent || !e.clipboardData?.files.length) return;
    e.preventDefault();
    take(pictures(e.clipboardData.files));
  });
}

// ---- tabs, theme, models ---------------------------------------------------------------------------------------
const tabs = [...document.querySelectorAll("[role=tab]")];
function open(name) {
  for (const tab of tabs) {
    const on = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !on;
  }
  if (location.hash.slice(1) !== name) history.replaceState(null, "", `#${name}`);
  if (name === "runs") watch();
}
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", e => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[e.key];
    if (to === undefined) return;
    e.preventDefault();
    const next = tabs[(to + tabs.length) % tabs.length];
    next.focus(); next.click();
  });
}
addEventListener("hashchange", () => tabs.some(t => t.id === `tab-${location.hash.slice(1)}`) && open(location.hash.slice(1)));

const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => { document.documentElement.dataset.theme = keep.getItem("theme") || (dark.matches ? "dark" : "light"); };
dark.addEventListener("change", paint);
$("#theme").addEventListener("click", () => {
  keep.setItem("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});
paint();

let models = [];
const chosen = () => $("#model").value;
function defaults() {
  const own = models.find(m => m.id === chosen());
  for (const input of document.querySelectorAll("form input[name]")) {
    const value = own?.parameters[input.name];
    if (value !== undefined) input.placeholder = value;
    else if (/_steps|_scale/.test(input.name)) input.placeholder = "–";
    if (/_steps|_scale/.test(input.name) && input.form.id !== "versus") input.disabled = value === undefined; // not every model has them
    if (input.name === "num_inference_steps") input.max = own.limits.steps;
  }
  for (const select of document.querySelectorAll("select[name=preset]")) {
    select.replaceChildren(make("option", { value: "", textContent: "the model's own" }), ...own.presets.map(value => make("option", { value, textContent: value })));
    select.disabled = !own.presets.length;
  }
  for (const name of SETTINGS) for (const input of document.querySelectorAll(`[name=${name}]`)) input.disabled = own.parameters[name] === undefined;
  for (const input of document.querySelectorAll("[name=guidance_from]")) input.disabled = own.parameters.guidance_interval === undefined;
  $("#sizes").replaceChildren(...sizes(own).map(value => make("option", { value })));
  aboutLine.textContent = describe(own);
  for (const [name, tab] of [["generate", "create"], ["edit", "edit"]]) $(`#tab-${tab}`).disabled = !own.capabilities[name];
}
function sizes(own) { // what the model draws, as choices; squares first
  if (!own?.sizes) return [];
  const { default: [w, h], stride, shortest, longest, pixels } = own.sizes, squares = [];
  const step = stride * Math.max(1, Math.ceil((longest - shortest) / stride / 11));
  for (let side = longest; side >= shortest; side -= step) squares.push(`${side}x${side}`);
  const wide = Math.max(shortest, Math.round(longest * 2 / 3 / stride) * stride);
  const fits = size => { const [width, height] = size.split("x"); return width * height <= (pixels ?? Infinity); };
  return [...new Set([`${w}x${h}`, ...squares, `${longest}x${wide}`, `${wide}x${longest}`])].filter(fits);
}
const aboutLine = $("#about"); // leaves the page with the first message
function describe(own) {
  if (!own?.sizes) return "";
  const { shortest, longest, read } = own.sizes;
  const side = shortest === longest ? `of ${longest} pixels a side` : `of ${shortest} to ${longest} pixels a side`;
  return `${own.id} draws pictures ${side} and reads them at up to ${read}.`;
}
async function begin() {
  notice("");
  models = (await (await ask("/v1/models")).json()).data;
  for (const select of [$("#model"), $("[name=left]"), $("[name=right]")])
    select.replaceChildren(...models.map(m => make("option", { value: m.id, textContent: m.id })));
  if (models[1]) $("[name=right]").value = models[1].id;
  $("#alone").textContent = models[1] ? "" : "One model is loaded; start the server with two to compare them.";
  defaults();
}
$("#model").addEventListener("change", defaults);
$("#key").addEventListener("submit", e => {
  e.preventDefault();
  session.setItem("key", e.target.key.value);
  e.target.hidden = true;
  begin().catch(error => notice(error.message));
});

const SETTINGS = ["timestep_shift", "renorm", "renorm_min", "source_share"]; // sent by name, under settings
function fields(form) { // what has been filled in, numbers as numbers
  const out = {};
  for (const input of form.querySelectorAll("[name]")) {
    if (input.value === "" || input.disabled || ["left", "right"].includes(input.name)) continue;
    if (input.type === "checkbox") { if (input.checked) out[input.name] = true; continue; }
    const value = input.type === "number" ? Number(input.value) : input.value;
    if (input.name === "guidance_from") (out.settings ??= {}).guidance_interval = [value, 1];
    else if (SETTINGS.includes(input.name)) (out.settings ??= {})[input.name] = value;
    else out[input.name] = value;
  }
  return out;
}
function busy(form, run) { // the form's button stops what it has started
  const button = $("button.main", form), label = button.textContent;
  let going = null;
  form.addEventListener("submit", async e => {
    e.preventDefault();
    if (going) return going.abort();
    going = new AbortController();
    notice("");
    try {
      const work = run(going.signal);
      button.textContent = "Stop";
      await work;
    } catch (error) {
      if (error.name !== "AbortError") notice(error.message);
    } finally { going = null; button.textContent = label; }
  });
}

// ---- chat ------------------------------------------------------------------------------------------------------
let messages = [], shown = [];
const talk = $("#talk"), say = $("#say"), start = talk.firstElementChild;
function thumbs() {
  $("#shown").replaceChildren(...shown.map((uri, i) => {
    const button = make("button", { type: "button", title: "Remove this picture" }, make("img", { src: uri, alt: `Picture ${i + 1} to send` }));
    button.addEventListener("click", () => { shown.splice(i, 1); thumbs(); });
    return button;
  }));
}
bring($("#chat"), $("input[type=file]", say), async files => {
  try { shown.push(...await Promise.all(files.map(read))); thumbs(); say.text.focus(); } catch (error) { notice(error.message); }
});
const bottom = () => scrollTo(0, document.documentElement.scrollHeight); // below what the form would cover
function bubble(role, parts) {
  start.remove();
  const turn = make("div", { className: `turn ${role}` });
  for (const part of parts) turn.append(part.type === "text" ? part.text : make("img", { src: part.image_url.url, alt: "A picture you sent" }));
  talk.append(turn);
  bottom();
  return turn;
}
for (const field of document.querySelectorAll("textarea"))
  field.addEventListener("keydown", e => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) { e.preventDefault(); field.form.requestSubmit(); } });
$("#fresh").addEventListener("click", () => { messages = []; shown = []; thumbs(); talk.replaceChildren(start); say.text.focus(); });
for (const [text, modality] of [["a red circle left of a blue star", "image"], ["two green squares", "image"], ["a yellow triangle", "image,text"]]) {
  const idea = make("button", { type: "button", textContent: text });
  idea.addEventListener("click", () => { say.text.value = text; say.modalities.value = modality; say.requestSubmit(); });
  $(".ideas").append(idea);
}
busy(say, async signal => {
  const text = say.text.value.trim();
  if (!text && !shown.length) return;
  const parts = [...shown.map(url => ({ type: "image_url", image_url: { url } })), ...(text ? [{ type: "text", text }] : [])];
  const modalities = say.modalities.value.split(",");
  say.text.value = ""; shown = []; thumbs();
  const sent = parts.filter(p => p.type === "image_url").map(p => p.image_url.url), asked = bubble("user", parts);
  const turn = bubble("assistant", []), content = [];
  turn.classList.add("waiting");
  let words = null, image = null;
  const json = { model: chosen(), messages: [...messages, { role: "user", content: parts }], modalities, stream: true };
  if (modalities.includes("image")) json.partial_images = 6;
  if (say.think.checked) json.think = true;
  let thought = null;
  try {
    for await (const row of stream("/v1/chat/completions", { json, signal })) {
      const delta = row.choices[0]?.delta ?? {};
      if (delta.reasoning_content) {
        if (!thought) { thought = make("em", { className: "hint" }); turn.append(make("details", { open: true }, make("summary", { textContent: "Thoughts" }), thought)); }
        thought.append(delta.reasoning_content);
      }
      if (typeof delta.content === "string" && delta.content) {
        if (!words) { words = document.createTextNode(""); turn.append(words); content.push({ type: "text", text: "" }); }
        words.data += delta.content;
        content.at(-1).text += delta.content;
      }
      if (delta.preview || Array.isArray(delta.content)) {
        if (!image) { image = make("img", { alt: `Drawing: ${text}`, onload: bottom }); turn.append(image); }
        image.src = delta.preview?.url ?? delta.content[0].image_url.url;
        if (!delta.preview) { image.alt = `Drawn: ${text}`; content.push(delta.content[0]); image = words = null; }
      }
      bottom();
    }
    if (!content.length) turn.textContent = "(nothing)";
    else messages.push({ role: "user", content: parts }, { role: "assistant", content });
  } catch (error) {
    asked.remove(); // what was asked is back in the form
    if (!say.text.value) say.text.value = text;
    shown = [...sent, ...shown]; thumbs();
    if (error.name === "AbortError") turn.append(" (stopped)");
    else { turn.classList.add("wrong"); turn.append(error.message); }
  } finally { turn.classList.remove("waiting"); bottom(); }
});

// ---- pictures --------------------------------------------------------------------------------------------------
function card(caption) {
  const image = make("img", { alt: "" });
  image.hidden = true;
  const figure = make("figure", { className: "picture sharpening" }, make("div", { className: "frame" }, image), make("figcaption", { textContent: caption }));
  return {
    figure,
    show(row, text) {
      image.hidden = false;
      image.src = `data:image/png;base64,${row.b64_json}`;
      const left = row.of ? 1 - row.step / row.of : 0;
      figure.style.setProperty("--done", `${100 - left * 100}%`);
      if (row.of) { $("figcaption", figure).textContent = `step ${row.step} of ${row.of}`; return; }
      figure.classList.remove("sharpening");
      image.alt = text;
    },
    caption: (...parts) => $("figcaption", figure).replaceChildren(...parts),
    get uri() { return image.src; },
  };
}
async function sharpen(path, options, cards, text, finished) {
  try {
    for await (const row of stream(path, options)) {
      cards[row.index].show(row, text);
      if (row.type.endsWith(".completed")) finished(row, cards[row.index]);
    }
  } catch (error) {
    for (const one of cards) if (one.figure.classList.contains("sharpening")) one.figure.remove();
    throw error;
  }
}

const gallery = $("#gallery");
busy($("#draw"), async signal => {
  const form = $("#draw"), asked = fields(form), n = asked.n ?? 1;
  $(".empty", gallery)?.remove();
  const cards = Array.from({ length: n }, () => card("in line …"));
  gallery.prepend(...cards.map(c => c.figure));
  const json = { ...asked, model: chosen(), stream: true, partial_images: 6 };
  await sharpen("/v1/images/generations", { json, signal }, cards, asked.prompt, (row, one) => {
    const more = make("button", { type: "button", textContent: "More like this", title: "Keep the seed and change the words" });
    more.addEventListener("click", () => {
      for (const [name, value] of Object.entries({ ...asked, seed: row.seed, n: 1 })) if (form.elements[name]?.type !== "checkbox" && name !== "settings") form.elements[name].value = value;
      form.prompt.focus(); form.prompt.select();
    });
    const change = make("button", { type: "button", textContent: "Edit" });
    change.addEventListener("click", () => { use(one.uri); open("edit"); $("#change").prompt.focus(); });
    const save = make("a", { href: one.uri, download: `${row.seed}.png`, textContent: "Save" });
    one.caption(asked.prompt, make("div", { className: "hint", textContent: `seed ${row.seed}` }), make("div", { className: "bar" }, more, change, save));
  });
});

// ---- edit ------------------------------------------------------------------------------------------------------
let source = null;
const zone = $("#source");
function use(uri) {
  source = uri;
  $("span", zone)?.remove(); $("img", zone)?.remove();
  zone.prepend(make("img", { src: uri, alt: "The picture to edit" }));
}
bring(zone, $("input", zone), async files => { try { if (files[0]) use(await read(files[0])); } catch (error) { notice(error.message); } });
busy($("#change"), async signal => {
  if (!source) throw new Error("Choose a picture to edit first.");
  const asked = fields($("#change")), before = source, body = new FormData();
  body.append("image", blob(before), "source.png");
  for (const [name, value] of Object.entries({ ...asked, model: chosen(), stream: "true", partial_images: 6 })) body.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  const one = card("…"), place = $("#edited");
  place.replaceChildren(one.figure);
  one.figure.classList.add("slider");
  await sharpen("/v1/images/edits", { method: "POST", body, signal }, [one], asked.prompt, row => {
    const slider = make("div", { className: "slider" },
      make("img", { src: before, alt: "Source" }), make("img", { src: one.uri, alt: `Edited: ${asked.prompt}`, className: "after" }));
    const range = make("input", { type: "range", min: 0, max: 100, value: 50 });
    range.setAttribute("aria-label", "How much of the source to show");
    const show = () => slider.style.setProperty("--at", `${range.value}%`);
    range.addEventListener("input", show);
    slider.addEventListener("pointermove", e => {
      if (e.pointerType === "mouse" && !e.buttons) return;
      const box = slider.getBoundingClientRect();
      range.value = (e.clientX - box.left) / box.width * 100;
      show();
    });
    slider.addEventListener("dragstart", e => e.preventDefault());
    const on = make("button", { type: "button", textContent: "Go on from this" });
    on.addEventListener("click", () => { use(one.uri); $("#change").prompt.focus(); });
    const save = make("a", { href: one.uri, download: `edit-${row.seed}.png`, textContent: "Save" });
    place.replaceChildren(slider, make("div", { className: "below" }, range,
      make("div", { className: "bar" }, ...["source", `seed ${row.seed}`, "edit"].map(textContent => make("span", { textContent }))),
      make("div", { className: "bar actions" }, on, save)));
    range.focus();
  });
});

// ---- compare ---------------------------------------------------------------------------------------------------
busy($("#versus"), async signal => {
  const form = $("#versus"), asked = fields(form);
  const cards = [form.left.value, form.right.value].map(model => [model, card(`${model} …`)]);
  $("#both").replaceChildren(...cards.map(([, c]) => c.figure));
  await Promise.all(cards.map(([model, one]) => sharpen(
    "/v1/images/generations", { json: { ...asked, model, stream: true, partial_images: 6 }, signal }, [one], `${asked.prompt}, by ${model}`,
    row => one.caption(make("strong", { textContent: model }), make("div", { className: "hint", textContent: `seed ${row.seed}` + (row.parameters.num_inference_steps ? `, ${row.parameters.num_inference_steps} steps` : "") })))));
});

// ---- runs ------------------------------------------------------------------------------------------------------
const run = $("#run"), sheets = $("#sheets"), range = $("input", sheets);
let rows = [], seen = "", about = null, timer = 0, sheetUrl = "";
function curve(name, values) {
  const w = 400, h = 140, xs = values.map(v => v[0]), ys = values.map(v => v[1]);
  const [x0, x1, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const at = ([x, y]) => `${((x - x0) / (x1 - x0 || 1) * w).toFixed(1)} ${(h - 4 - (y - low) / (high - low || 1) * (h - 8)).toFixed(1)}`;
  const reach = Math.ceil(ys.length / 40);
  const smooth = values.map(([x], i) => { // mean of the neighbours on both sides
    const near = ys.slice(Math.max(0, i - reach), i + reach + 1);
    return [x, near.reduce((sum, y) => sum + y, 0) / near.length];
  });
  const path = (points, kind) => `<path class="${kind}" stroke="currentColor" d="M${points.map(at).join("L")}"/>`;
  const card = make("div", { className: "card curve" }, make("h2", { textContent: name }, make("span", { textContent: ys.at(-1).toPrecision(4) })));
  card.insertAdjacentHTML("beforeend", `<svg viewBox="0 0 ${w} ${h}" preserveAspectRatio="none" role="img">${path(values, "raw")}${path(smooth, "smooth")}</svg>`);
  $("svg", card).setAttribute("aria-label", `${name}: ${ys.at(-1).toPrecision(4)} at step ${xs.at(-1)}, between ${low.toPrecision(3)} and ${high.toPrecision(3)}`);
  card.append(make("div", { className: "ends" }, make("span", { textContent: `step ${x0}` }), make("span", { textContent: `${+low.toPrecision(3)} – ${+high.toPrecision(3)}` }), make("span", { textContent: `step ${x1}` })));
  return card;
}
async function sheet() {
  const file = about.samples[range.value];
  if (!file) return;
  const data = await (await ask(`/v1/diptych/runs/sample?${new URLSearchParams({ run: run.value, file })}`)).blob();
  URL.revokeObjectURL(sheetUrl);
  $("img", sheets).src = sheetUrl = URL.createObjectURL(data);
  $("span", sheets).textContent = `step ${Number(file.match(/\d+/)[0])}`;
}
async function watch() {
  clearTimeout(timer);
  if ($("#runs").hidden) return;
  try {
    const there = (await (await ask("/v1/diptych/runs")).json()).data.map(r => r.id);
    if (there.join() !== [...run.options].map(o => o.value).join()) {
      const before = run.value;
      run.replaceChildren(...there.map(id => make("option", { value: id, textContent: id })));
      if (there.includes(before)) run.value = before;
    }
    $("#no-runs").hidden = there.length > 0;
    if (run.value) {
      if (seen !== run.value) { seen = run.value; rows = []; about = null; }
      const which = new URLSearchParams({ run: run.value });
      const news = (await (await ask(`/v1/diptych/runs/metrics?${which}&after=${rows.at(-1)?.step ?? -1}`)).json()).data;
      rows = [...rows, ...news];
      if (rows.length > 1000) rows = rows.filter((_, i) => i % 2 === rows.length % 2 ^ 1);
      const latest = await (await ask(`/v1/diptych/runs/about?${which}`)).json();
      if (news.length || !about) {
        const names = ["loss", ...Object.keys(Object.assign({}, ...rows)).filter(k => /^(loss\/|reward|dev|variety|even|policy)/.test(k)), "lr", "tokens_per_second", "images_per_second", "gradient_norm"];
        const curves = names.map(n => [n, rows.filter(r => typeof r[n] === "number").map(r => [r.step, r[n]])]).filter(([, v]) => v.length);
        $("#curves").replaceChildren(...curves.map(([n, v]) => curve(n, v)));
      }
      const total = latest.stages.reduce((sum, s) => sum + s.steps, 0), last = rows.at(-1);
      $("#state").textContent = last ? `${latest.recipe ?? ""}  ${last.stage ?? ""}  step ${last.step}${total ? ` of ${total}` : ""}` : "no steps yet";
      if (latest.samples.length !== about?.samples.length) {
        about = latest;
        sheets.hidden = !about.samples.length;
        range.max = about.samples.length - 1; range.value = range.max;
        await sheet();
      }
    }
  } catch (error) { notice(error.message); }
  timer = setTimeout(watch, 3000);
}
run.addEventListener("change", watch);
range.addEventListener("input", () => sheet().catch(error => notice(error.message)));

open(tabs.some(t => t.id === `tab-${location.hash.slice(1)}`) ? location.hash.slice(1) : "chat");
begin().catch(error => notice(error.message));
