// The canvas of a notebook: ipyniivue's widget `inner`, sending less and drawing once. `dress` is that of viewer.js.

/** Keeps the voxels, which came from the kernel, from being sent back to it. */
async function keepVoxels(model) {
  for (const place of model.get("volumes")) {
    const volume = await model.widget_manager.get_model(place.replace("IPY_MODEL_", ""));
    const send = volume.send_sync_message;
    volume.send_sync_message = (state, ...more) =>
      Object.keys(state).some(name => name.startsWith("chunk_")) ? "" : send.call(volume, state, ...more);
  }
}

return {
  initialize: context => inner.initialize(context),
  async render(context) {
    const { model } = context, nv = instance();
    if (nv.canvas) return inner.render(context);  // shown in another place
    await keepVoxels(model);
    let beside = null;
    if (model.get("beside").byteLength) {
      const packed = new Blob([model.get("beside")]).stream().pipeThrough(new DecompressionStream("gzip"));
      beside = new Uint8Array(await new Response(packed).arrayBuffer());
    }
    const update = nv.updateGLVolume;
    nv.updateGLVolume = () => {};  // ipyniivue draws everything anew for each volume; here once, at the end
    const leave = await inner.render(context);
    while (!nv.initialized) await new Promise(resolve => setTimeout(resolve, 5));
    nv.updateGLVolume = update;
    dress(nv, NVMesh, () => {
      const shown = model.get("shown");
      return { ...shown, beside: beside && shown.beside.length ? { name: "reference", values: beside, colours: shown.beside } : null };
    });
    model.on("change:shown", () => nv.updateGLVolume());
    nv.updateGLVolume();
    return leave;
  },
};
