export default {
  render({ model, el }) {
    const image = document.createElement("img");
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.style.cssText = "position: absolute; z-index: 1; width: 100%; object-fit: contain; background: white;"
      + `height: ${model.get("height")}px`;
    el.style.cssText = "position: relative; height: 0; overflow: visible";
    el.append(image);
    const make_way = () => { if (model.get("covered")) image.remove(); };
    model.on("change:covered", make_way);
    make_way();
  }
};
