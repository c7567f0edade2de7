'use strict';

const DATA = JSON.parse(document.getElementById('data').textContent);
const INK = '#1a1a1a';
const CONFIG = {
  responsive: true, displaylogo: false, typesetMath: false,
  showSendToCloud: false, plotlyServerURL: '',  // Plotly offers to upload charts otherwise
  modeBarButtonsToRemove: ['select2d', 'lasso2d', 'zoomIn2d', 'zoomOut2d', 'autoScale2d'],
};
const byId = (id) => document.getElementById(id);
const distinct = (values) => [...new Set(values)];

function fill(select, options) {  // options: [value, label]
  for (const [value, label] of options) {
    select.add(new Option(label, value));
  }
}

// ---- Tables: a click on a header sorts, a list of temperatures filters.

function number(text) {
  const found = parseFloat(text);
  return Number.isNaN(found) ? null : found;
}

function sortBy(table, column) {
  const header = table.tHead.rows[0].cells[column];
  const descending = header.getAttribute('aria-sort') === 'ascending';
  for (const cell of table.tHead.rows[0].cells) {
    cell.setAttribute('aria-sort', 'none');
  }
  header.setAttribute('aria-sort', descending ? 'descending' : 'ascending');
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [row.cells[column].textContent.trim(), row]);
  const numeric = rows.every(([text]) => text === '' || number(text) !== null);
  const compare = numeric ? (a, b) => number(a) - number(b) : (a, b) => a.localeCompare(b);
  rows.sort(([a], [b]) => {
    if (a === '' || b === '') {  // nothing comes last, whichever way
      return (a === '') - (b === '');
    }
    return descending ? compare(b, a) : compare(a, b);
  });
  body.append(...rows.map(([, row]) => row));
}

for (const table of document.querySelectorAll('table.sortable')) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector('button').addEventListener('click', () => sortBy(table, column));
  });
}

for (const select of document.querySelectorAll('select.filter')) {
  const rows = [...byId(select.dataset.table).tBodies[0].rows];
  fill(select, [['', 'all'], ...distinct(rows.map((row) => row.dataset.temperature)).map(
    (value) => [value, value])]);
  select.addEventListener('change', () => rows.forEach((row) => {
    row.hidden = select.value !== '' && row.dataset.temperature !== select.value;
  }));
}

// ---- The explorer.

const AXES = {
  ms: {title: 'milliseconds a token (batch of prompts)', better: -1},
  speedup: {title: 'speed-up over the target alone', better: 1},
  tau: {title: 'block efficiency (tokens per target call)', better: 1},
  quality: {title: `${DATA.quality_metric} (%)`, better: 1},
};

function undominated(points, across, up) {
  const worth = (point) => [AXES[across].better * point[across], AXES[up].better * point[up]];
  const beats = (one, other) => {
    const [a, b] = [worth(one), worth(other)];
    return a[0] >= b[0] && a[1] >= b[1] && (a[0] > b[0] || a[1] > b[1]);
  };
  return points.filter((point) => !points.some((other) => beats(other, point)))
      .sort((a, b) => a[across] - b[across]);
}

function errors(points, axis, shown) {
  if (!shown || !points.some((point) => point[`${axis}_interval`])) {
    return {visible: false};
  }
  const interval = (point) => point[`${axis}_interval`] || [point[axis], point[axis]];
  return {
    type: 'data', symmetric: false, thickness: 1, width: 3,
    array: points.map((point) => Math.max(interval(point)[1] - point[axis], 0)),
    arrayminus: points.map((point) => Math.max(point[axis] - interval(point)[0], 0)),
  };
}

function symbol(point) {
  return (point.lossless ? 'circle' : 'diamond') + (point.greedy ? '-open' : '');
}

function methodTrace(method, points, across, up, withIntervals) {
  const color = DATA.colors[method];
  return {
    name: method, type: 'scatter', mode: 'markers+text', textposition: 'top right',
    x: points.map((point) => point[across]), y: points.map((point) => point[up]),
    text: points.map((point) => point.label), textfont: {size: 10, color: '#444'},
    hovertext: points.map((point) => point.hover), hovertemplate: '%{hovertext}<extra></extra>',
    marker: {color, size: 11, symbol: points.map(symbol), line: {color, width: 1.5}},
    error_x: {...errors(points, across, withIntervals), color},
    error_y: {...errors(points, up, withIntervals), color},
  };
}

function chosenPoints() {
  const [shape, rule] = [byId('shape').value, byId('rule').value];
  return DATA.points.filter((point) =>
    String(point.temperature) === byId('temperature').value
    && (shape === '' || point.shape === shape)
    && (rule === '' || (rule === 'lossless' ? point.lossless : point.rule === rule)));
}

function drawExplorer() {
  const [across, up] = [byId('across').value, byId('up').value];
  const points = chosenPoints().filter((point) => point[up] !== null);
  const alone = DATA.alone.filter((point) =>
    String(point.temperature) === byId('temperature').value && point[up] !== null);
  const best = undominated([...points, ...alone], across, up);
  const traces = [{
    name: 'nothing beats', type: 'scatter', mode: 'lines', hoverinfo: 'skip',
    x: best.map((point) => point[across]), y: best.map((point) => point[up]),
    line: {color: INK, width: 1.2},
  }];
  for (const method of Object.keys(DATA.colors)) {
    const mine = points.filter((point) => point.method === method);
    if (mine.length) {
      traces.push(methodTrace(method, mine, across, up, byId('intervals').checked));
    }
  }
  traces.push({
    name: 'target alone', type: 'scatter', mode: 'markers',
    x: alone.map((point) => point[across]), y: alone.map((point) => point[up]),
    hovertext: alone.map((point) => point.hover), hovertemplate: '%{hovertext}<extra></extra>',
    marker: {color: INK, size: 15, symbol: 'star'},
  });
  const shapes = [];
  if (up === 'quality' && DATA.max_quality_drop !== null && alone.length) {
    const least = (1 - DATA.max_quality_drop) * alone[0].quality;
    shapes.push({
      type: 'line', xref: 'paper', x0: 0, x1: 1, y0: least, y1: least, layer: 'below',
      line: {color: '#D55E00', dash: 'dot', width: 1.5},
    });
  }
  Plotly.react('explorer-plot', traces, {...DATA.layout, shapes, hovermode: 'closest',
    uirevision: [across, up].join(),
    xaxis: {...DATA.layout.xaxis, title: {text: AXES[across].title}},
    yaxis: {...DATA.layout.yaxis, title: {text: AXES[up].title}}}, CONFIG);
  byId('shown').textContent = points.length
    ? `${points.length} of ${DATA.points.length} settings shown.`
    : 'No setting is like that: choose another draft or rule.';
}

function startExplorer() {
  const values = (name) => distinct(DATA.points.map((point) => point[name]));
  fill(byId('temperature'), values('temperature').map((value) => [value, value]));
  fill(byId('shape'), [['', 'all'], ...values('shape').map((value) => [value, value])]);
  fill(byId('rule'), [['', 'all'], ['lossless', 'lossless ones'],
                      ...values('rule').map((value) => [value, value])]);
  const hasQuality = DATA.points.some((point) => point.quality !== null);
  fill(byId('up'), [...(hasQuality ? [['quality', AXES.quality.title]] : []),
                    ['tau', 'block efficiency']]);
  for (const id of ['temperature', 'shape', 'rule', 'across', 'up', 'intervals']) {
    byId(id).addEventListener('change', drawExplorer);
  }
  drawExplorer();
}

// ---- Samples: one prompt at one temperature, all methods below each other.

function startSamples() {
  const [temperature, prompt] = [byId('sample-temperature'), byId('sample-prompt')];
  if (!temperature) {
    return;
  }
  const samples = [...document.querySelectorAll('.sample')];
  const values = (name) => distinct(samples.map((sample) => sample.dataset[name])).filter(Boolean);
  const show = () => samples.forEach((sample) => {
    const {temperature: itsTemperature, prompt: itsPrompt} = sample.dataset;
    sample.hidden = itsPrompt !== prompt.value || (
      itsTemperature !== undefined && itsTemperature !== temperature.value);
  });
  for (const [select, name] of [[temperature, 'temperature'], [prompt, 'prompt']]) {
    fill(select, values(name).map((value) => [value, value]));
    select.addEventListener('change', show);
  }
  show();
}

startExplorer();
startSamples();
for (const [id, figure] of Object.entries(DATA.figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, CONFIG);
}
