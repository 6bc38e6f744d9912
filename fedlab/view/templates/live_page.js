// A saved page: NiiVue on the patients packed into it, with controls. `dress` and `element` are those of viewer.js.

async function unpacked(text) {
  const packed = new Blob([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))]);
  return new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function start(root) {
  const { cases, labels, errors, regions, shown: now } = JSON.parse(root.querySelector("script").textContent);
  const { Niivue, NVImage, NVMesh } = await niivue(root.ownerDocument);
  const controls = root.querySelector(".controls"), box = root.querySelector(".canvas"), facts = root.querySelector(".scores");
  let one = cases[0], beside = null;
  const nv = new Niivue({ logLevel: "error", sliceType: 3, crosshairColor: [0.5, 0.83, 1, 0.8], isAntiAlias: true });
  await nv.attachToCanvas(box.querySelector("canvas"));
  while (!nv.initialized) await new Promise(resolve => setTimeout(resolve, 10));

  const wrong = () => now.overlay.startsWith("errors"), parts = () => wrong() ? errors : labels;
  const colours = (of, hidden) => {
    const lut = new Array(20).fill(0);
    for (const [value, { colour, opacity }] of Object.entries(of)) if (!hidden.includes(Number(value)))
      lut.splice(4 * value, 4, ...[1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16)), Math.round(255 * opacity));
    return lut;
  };
  const hidden = () => wrong() ? [] : now.hidden;
  dress(nv, NVMesh, () => ({
    patient: one.patient, layer: one.layers[now.layer]?.name ?? "", modality: now.modality, start: one.start,
    low: one.modalities[now.modality].low, high: one.modalities[now.modality].high,
    names: Object.fromEntries(Object.entries(parts()).map(([value, part]) => [value, part.name])),
    beside: beside && now.overlay !== "none" ? { ...beside,
      colours: colours(labels, now.hidden).map((part, at) => at % 4 === 3 ? part * now.opacity : part) } : null }));

  const memory = new Map();
  const voxels = async (kind, name) => {
    const key = `${one.patient}/${kind}/${name}`;
    if (!memory.has(key)) memory.set(key, new Uint8Array(await unpacked(one[kind][name].data)));
    return memory.get(key);
  };
  const values = async () => {
    const blank = () => new Uint8Array(one.shape[0] * one.shape[1] * one.shape[2]);
    if (now.overlay === "none" || !one.layers[now.layer]) return blank();
    const layer = await voxels("layers", now.layer);
    if (!wrong()) return layer;
    const inside = regions[now.overlay.slice(7)], truth = await voxels("layers", "reference");
    return layer.map((value, at) => Number(inside.includes(value)) + 2 * Number(inside.includes(truth[at])));
  };

  let turn = 0;
  async function refresh({ patient = false, scan = patient, overlay = patient } = {}) {
    const mine = ++turn, file = await voxels("modalities", now.modality), over = await values();
    const other = now.layer === "reference" ? Object.keys(one.layers).find(name => name !== "reference") : "reference";
    beside = one.layers[other] && one.layers[now.layer] ? { name: one.layers[other].name, left: other === "reference",
      values: await voxels("layers", other) } : null;
    if (mine !== turn) return refresh({ patient, scan, overlay });  // a later choice has come between
    if (patient) {
      const whole = new Uint8Array(file.length);
      whole.set(file.subarray(0, 352));
      whole.set(over, 352);
      const image = (bytes, name, colormap) => NVImage.new(bytes.slice().buffer, name, colormap, 1, null, 0,
        name === "scan.nii" ? 255 : 4, true, 0.02, false, false, "", 0, undefined, NaN, NaN, false, null, 0, null);
      const volumes = [await image(file, "scan.nii", "gray"), await image(whole, "overlay.nii", "gray")];
      [nv.volumes, nv.back, nv.overlays] = [volumes, volumes[0], [volumes[1]]];
      nv.scene.crosshairPos = one.crosshair.map((voxel, axis) => (voxel + 0.5) / one.shape[axis]);
    }
    const [image, mask] = nv.volumes;
    if (scan && !patient) Object.assign(image, { img: file.subarray(352), cal_min: 0, cal_max: 255 });
    if (overlay && !patient) mask.img = over;
    mask.colormapLabel = { lut: Uint8ClampedArray.from(colours(parts(), hidden())), min: 0, max: 4 };
    mask.opacity = now.opacity;
    nv.opts.sliceType = now.view;
    nv.updateGLVolume();
    numbers();
    root.classList.add("ready");
  }

  const menu = (text, options, value, act) => {
    const label = element("label", controls, { textContent: text }), select = element("select", label);
    for (const [key, name] of options) element("option", select, { value: key, textContent: name });
    select.value = value;
    select.onchange = () => act(select.value);
    return select;
  };
  const buttons = (text, names, pressed, act, colour) => {
    const group = element("div", controls, { className: "group" });
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", text);
    const made = names.map(([key, name]) => {
      const one = element("button", group, { type: "button", textContent: name, onclick: () => { act(key); press(); } });
      one.dataset.key = key;
      if (colour) one.style.setProperty("--colour", colour(key));
      return one;
    });
    const press = () => made.forEach(one => one.setAttribute("aria-pressed", pressed(one.dataset.key)));
    press();
    return { group, press, made };
  };

  function build() {
    controls.replaceChildren();
    if (cases.length > 1) menu("patient", cases.map((other, number) => [number, other.patient]), cases.indexOf(one), number => {
      one = cases[number];
      if (!one.layers[now.layer]) now.layer = Object.keys(one.layers).at(-1) ?? null;
      build();
      refresh({ patient: true });
    });
    menu("modality", Object.keys(one.modalities).map(name => [name, name]), now.modality, name => {
      now.modality = name;
      refresh({ scan: true });
    });
    menu("view", [[3, "planes and 3-D"], [0, "axial"], [1, "coronal"], [2, "sagittal"], [4, "3-D"]], now.view, view => {
      now.view = Number(view);
      nv.opts.sliceType = now.view;
      nv.drawScene();
    });
    const scored = one.layers.reference && Object.keys(one.layers).length > 1;
    const choices = ["labels", ...(scored ? Object.keys(regions).map(region => `errors ${region}`) : []), "none"];
    if (!choices.includes(now.overlay)) now.overlay = "labels";
    menu("overlay", choices.map(name => [name, name]), now.overlay, name => {
      now.overlay = name;
      chips();
      refresh({ overlay: true });
    });
    const label = element("label", controls, { textContent: "opacity" });
    const slider = element("input", label, { type: "range", min: 0, max: 1, step: 0.05, value: now.opacity, oninput: () => {
      now.opacity = Number(slider.value);
      refresh();
    } });
    buttons("arm", Object.entries(one.layers).map(([key, { name }]) => [key, name]), key => key === now.layer, key => {
      now.layer = key;
      refresh({ overlay: true });
    });
    let group = null;
    function chips() {
      group?.remove();
      const of = parts();
      ({ group } = buttons("parts", Object.entries(of).map(([value, { short, name }]) => [value, short ?? name]),
        value => wrong() || !now.hidden.includes(Number(value)), value => {
          if (wrong()) return;
          const number = Number(value), at = now.hidden.indexOf(number);
          if (at < 0) now.hidden.push(number); else now.hidden.splice(at, 1);
          refresh();
        }, value => of[value].colour));
      group.classList.add("chips");
      for (const chip of group.children) Object.assign(chip, { disabled: wrong(), title: of[chip.dataset.key].name });
    }
    chips();
  }

  /** Volumes and Dice of every layer; the one shown is marked. */
  function numbers() {
    facts.replaceChildren();
    const head = element("tr", element("thead", facts));
    const names = Object.values(one.layers)[0]?.facts.map(fact => fact.region) ?? [];
    const scored = Object.values(one.layers).some(layer => layer.facts.some(fact => fact.dice !== null));
    for (const text of ["", ...names.flatMap(name => [`${name} [ml]`, ...(scored ? [`${name} Dice`] : [])])])
      element("th", head, { textContent: text });
    const body = element("tbody", facts);
    for (const [key, layer] of Object.entries(one.layers)) {
      const row = element("tr", body, { className: key === now.layer ? "now" : "" });
      element("th", row, { textContent: layer.name });
      for (const { region, ml, dice } of layer.facts) {  // labels: where the page is narrow, the head is hidden
        element("td", row, { textContent: ml.toFixed(1) }).dataset.label = `${region} [ml]`;
        if (scored) element("td", row, { textContent: dice === null ? "–" : dice.toFixed(3) }).dataset.label = `${region} Dice`;
      }
    }
  }
  build();
  await refresh({ patient: true });
}

/** NiiVue's classes, from the script packed into the page, which the page's policy knows by its hash. */
let loaded = null;
function niivue(page) {
  loaded ??= new Promise((resolve, reject) => {
    unpacked(page.getElementById("fedlab-niivue").textContent).then(text => {
      globalThis.fedlabNiiVue = resolve;
      const script = Object.assign(page.createElement("script"), { type: "module", onerror: reject });
      script.textContent = new TextDecoder().decode(text);
      page.head.append(script);
    }, reject);
  });
  return loaded;
}

for (const root of document.querySelectorAll(".fedlab-viewer")) {
  const watch = new IntersectionObserver(entries => {
    if (!entries.some(entry => entry.isIntersecting)) return;
    watch.disconnect();
    start(root).catch(error => {
      root.classList.add("failed");
      root.querySelector(".note").textContent = `The 3-D view needs a browser with WebGL 2 and scripts (${error.message ?? error}).`;
    });
  });
  watch.observe(root);
}
