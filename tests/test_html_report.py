"""The page says what the rows say, needs nothing else, and runs nothing that a model wrote."""

import base64
import hashlib
import html.parser
import json
import shutil

import pytest

import results
from specdistill_jax.evaluation import frontier
from specdistill_jax.evaluation import rows
from specdistill_jax.evaluation import summary as summary_lib
from specdistill_jax.evaluation import tradeoff
from specdistill_jax.stages import html_report
from specdistill_jax.stages import report
from specdistill_jax.stages import sample_texts
from specdistill_jax.stages import tree_pictures

DISTILLED = 'DistillSpec (forward_kl, draft)'
EVIL = '</script><script>document.title = "run"</script><img src=x onerror="document.title=1">'
PLACE = '{{script}}'  # looks like a place of the template
PIECES = ['def', ' f', '(', ')', ':\n', EVIL, PLACE, sample_texts.END]
DRAFTED = [True, True, False, True, True, True, False, False]


def write_study(workdir, made):
  """Rows, curves, sample texts and a tree; the texts are as hostile as a model's may be."""
  results.write(workdir, made)
  hashed = made[0]['config_hash']
  for temperature in (0.0, 1.0):
    for objective, data_source in (('none', None), ('forward_kl', 'draft')):
      rows.append(workdir / sample_texts.FILE, *(dict(
          objective=objective, data_source=data_source, temperature=temperature,
          config_hash=hashed, train_steps=0, seed=0, gamma=5, tree='chain', rule='exact',
          epsilon=1.0, lossless=True, draft_sampling='sampled', min_confidence=0.0,
          number=number, prompt=f'prompt {number} {EVIL}', pieces=PIECES, drafted=DRAFTED,
          tokens=list(range(len(PIECES))), target_calls=3) for number in (1, 2)))
  for category in ('poems', EVIL):
    for line in [line for line in made if line['temperature'] == 1.0]:
      rows.append(workdir / 'results.jsonl', line | dict(category=category))
  picture = dict(parents=[0, 0, 1], words=['the', EVIL, ' <b>', '\n'], kept=[0, 1, 3],
                 probabilities=[0.5, 0.25, 0.125], next_word=' end', cycle=2)
  rows.append(workdir / tree_pictures.FILE, dict(
      temperature=1.0, tree='eagle1', rule='exact', objective='forward_kl', data_source='draft',
      config_hash=hashed, picture=picture))


class Page(html.parser.HTMLParser):
  """Elements with their attributes, cells of tables, and texts of scripts and of sample texts."""

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.elements, self.tables, self.scripts, self.spans = [], {}, [], []
    self._sinks = [None]  # of the open elements: lists whose last entry takes the text
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.elements.append((tag, attributes))
    sink = self._sinks[-1]
    if tag == 'table':
      self._table = self.tables.setdefault(attributes['id'], [])
    elif tag == 'tr':
      self._table.append([])
    elif tag in ('td', 'button'):
      sink = self._table[-1]
    elif tag == 'script':
      sink = self.scripts
    elif tag == 'span' and 'title' in attributes:
      sink = []
      self.spans.append((attributes['class'], sink))
    if sink is not self._sinks[-1]:
      sink.append('')
    if tag not in ('meta', 'link', 'img', 'input'):
      self._sinks.append(sink)

  def handle_endtag(self, tag):
    self._sinks.pop()

  def handle_data(self, data):
    if self._sinks[-1] is not None:
      self._sinks[-1][-1] += data

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope='module')
def summaries():
  return summary_lib.summarise(results.lossy_study(), samples=100)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('study')
  write_study(workdir, results.lossy_study())
  config = results.config()
  config.evaluate.max_quality_drop = 0.1
  report.run(config, workdir)
  return workdir / 'report.html'


@pytest.fixture(scope='module')
def page(path):
  return Page(path.read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def data(page):
  return json.loads(page.scripts[0])


def test_every_row_of_the_table_is_there(page, summaries):
  header, lines = report.table(summaries)
  assert page.tables['results-table'] == [list(header), *map(list, lines)]


def test_categories_have_a_table(page):
  lines = page.tables['categories-table']
  assert lines[0][-2:] == [f'{EVIL} ({results.PROMPTS})', f'poems ({results.PROMPTS})']
  assert len(lines) == 1 + 9 and lines[1][0] == '1'  # temperature 1 alone has categories


def test_long_answers_are_lists(page, path):
  assert len(page.all('li')) == path.with_name('report.md').read_text().count('\n- ') > 2


def test_every_setting_is_a_point(data, summaries):
  assert [(point['method'], point['temperature'], point['rule'], point['lossless'],
           point['quality']) for point in data['points']] == [
               (s.method, s.temperature, s.rule, s.lossless, s.quality) for s in summaries]
  for point, s in zip(data['points'], summaries):
    assert point['ms'] == pytest.approx(1e3 / s.tokens_per_second)
    assert point['speedup'] == pytest.approx(s.speedup_measured)
    assert point['tau_interval'] == pytest.approx(s.block_efficiency_interval)
    told = (s.method, f'predicted {s.speedup_predicted:.2f}x', f'rule {s.rule}',
            f'ε = {s.epsilon:.3g}', f'γ = {s.gamma}', f'accuracy {s.quality:.1f} %, target 50.0',
            f'{s.num_seeds} seed', f'[{s.speedup_measured_interval[0]:.2f}, ')
    assert all(text in point['hover'] for text in told), point['hover']


def test_a_method_has_one_color_everywhere(data):
  looks = tradeoff.looks_of(data['colors'])
  assert data['colors'] == {name: color for name, (color, _) in looks.items()}
  assert len(set(data['colors'].values())) == 3
  for name in ('training-1', 'training-2'):
    drawn = [(trace['name'], trace['line']['color']) for trace in data['figures'][name]['data']
             if 'name' in trace]
    assert dict(drawn) == {name: data['colors'][name] for name in (DISTILLED, 'control')}
  alpha = data['figures']['training-1']['data']
  means = next(trace for trace in alpha if trace.get('name') == DISTILLED)
  assert means['y'][-1] == pytest.approx(0.705) and means['x'] == [0, 50, 100]
  assert sum(trace.get('legendgroup') == DISTILLED for trace in alpha) == 3  # mean and two seeds


def test_the_file_stands_alone(page):
  """Nothing is fetched, and a browser would refuse to."""
  assert not [name for tag in ('link', 'iframe', 'object') for name in page.all(tag)
              if not name.get('href', '').startswith('data:')]
  assert all(image['src'].startswith('data:image/png;base64,') for image in page.all('img'))
  assert not [script for script in page.all('script') if 'src' in script]
  policy = next(meta['content'] for meta in page.all('meta') if 'http-equiv' in meta)
  assert "default-src 'none'" in policy and 'unsafe-inline' not in policy.partition('style-src')[0]
  for script in page.scripts[1:]:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_text_of_a_model_is_shown_and_not_run(page, data):
  assert len(page.scripts) == 3  # the data, the library, and the page's own
  assert not any('onerror' in attributes for _, attributes in page.elements)
  assert page.spans[:len(PIECES)] == [
      ('drafted' if drafted else 'own', [piece.replace('\n', '⏎\n')])
      for piece, drafted in zip(PIECES, DRAFTED)]
  assert len(page.spans) == 2 * 2 * 2 * len(PIECES)
  words = [box['text'] for box in data['figures']['tree-1']['layout']['annotations']]
  assert not any('<img' in word or '<script' in word for word in words)
  assert any('␣&lt;b&gt;' in word for word in words)
  assert '<' not in html_report._json({'text': EVIL, 'more': ['<!--']})  # nor could the data


def test_a_study_without_texts_says_so(tmp_path):
  """Rows alone, without a metric, as studies had them before texts were kept."""
  for line in results.study(seeds=(0,)):
    rows.append(tmp_path / 'results.jsonl', line)
  report.run(results.config(), tmp_path)
  page = Page((tmp_path / 'report.html').read_text(encoding='utf-8'))
  sections = [section['id'] for section in page.all('section')]
  assert sections == ['answers', 'explorer', 'results', 'samples', 'plots']
  assert 'None is stored' in (tmp_path / 'report.html').read_text(encoding='utf-8')
  data = json.loads(page.scripts[0])
  assert data['quality_metric'] is None and not data['figures']


class Bytes:
  """A vocabulary whose tokens are bytes."""

  def decode(self, tokens):
    return bytes(tokens).decode('utf-8', 'replace')


def test_pieces_join_to_the_text():
  """A character of several tokens comes with its last one; what was cut off is seen."""
  text = 'é漢 x'
  found = sample_texts.pieces(Bytes(), [*text.encode(), 1], end_ids=[1])
  assert found == ['', 'é', '', '', '漢', ' ', 'x', sample_texts.END]
  assert sample_texts.pieces(Bytes(), list('aé'.encode())[:-1], [1]) == ['a', '\ufffd']
  assert sample_texts.pieces(None, [3, 1], [1]) == [' 3', ' 1']


# ---- In a browser.

OPTIONS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
           '--disable-background-networking', '--disable-component-update', '--disable-sync')


@pytest.fixture(scope='module')
def browser(path, tmp_path_factory):
  """Chromium with the page open in it."""
  webdriver = pytest.importorskip('selenium.webdriver', reason='selenium is not installed')
  found = [next(filter(None, map(shutil.which, names)), None) for names in (
      ('chromium', 'chromium-browser', 'google-chrome'), ('chromedriver',))]
  if None in found:
    pytest.skip('no Chromium with its chromedriver is installed')
  options = webdriver.ChromeOptions()
  options.binary_location = found[0]
  for option in (*OPTIONS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}'):
    options.add_argument(option)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
  driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
  driver.set_window_size(1280, 1000)
  driver.get('about:blank')
  driver.get_log('performance')  # of the page that a new window shows
  driver.get(path.as_uri())
  yield driver
  driver.quit()


def wait(browser):
  from selenium.common import exceptions
  from selenium.webdriver.support import ui
  return ui.WebDriverWait(
      browser, 60, ignored_exceptions=[exceptions.StaleElementReferenceException])


def column(browser, name):
  """What stands in the shown rows of the table of results."""
  return browser.execute_script("""
      const table = document.getElementById('results-table');
      const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
      return [...table.tBodies[0].rows].filter((row) => !row.hidden)
          .map((row) => row.cells[heads.indexOf(arguments[0])].textContent);""", name)


def click_header(browser, name):
  for button in browser.find_elements('css selector', '#results-table button'):
    if button.text.startswith(name):
      button.click()


def choose(browser, element, value):
  browser.execute_script("""
      const select = document.querySelector(arguments[0]);
      select.value = arguments[1];
      if (select.value !== arguments[1]) throw new Error(`${arguments[0]} has no ${arguments[1]}`);
      select.dispatchEvent(new Event('change'));""", element, value)


def drawn(browser, names=('standard SD', 'control', DISTILLED)):
  """(x, y) of every point of the explorer that belongs to these methods, or other traces."""
  traces = browser.execute_script("""
      return document.getElementById('explorer-plot').data.map(({name, x, y}) => [name, x, y]);""")
  return sorted(pair for name, xs, ys in traces for pair in zip(xs, ys) if name in names)


def test_a_click_on_a_header_sorts_by_numbers(browser):
  first = [float(text.split('x')[0]) for text in column(browser, 'speed-up')]
  click_header(browser, 'speed-up')
  up = [float(text.split('x')[0]) for text in column(browser, 'speed-up')]
  click_header(browser, 'speed-up')
  down = [float(text.split('x')[0]) for text in column(browser, 'speed-up')]
  assert first != up == sorted(first) and down == sorted(first, reverse=True)
  click_header(browser, 'tokens/s')  # as words, '1000' would come before '900'
  assert [int(text) for text in column(browser, 'tokens/s')] == sorted(
      int(text) for text in column(browser, 'tokens/s'))
  click_header(browser, 'method')
  assert column(browser, 'method') == sorted(column(browser, 'method'), key=str.lower)
  click_header(browser, 'γ')  # the target alone has none: last, whichever way
  click_header(browser, 'γ')
  assert column(browser, 'γ')[0] == '5' and column(browser, 'γ')[-2:] == ['', '']


def test_a_temperature_filters_the_table(browser, summaries):
  choose(browser, 'select.filter', '1')
  assert set(column(browser, 'T')) == {'1'}
  assert len(column(browser, 'T')) == 1 + sum(s.temperature == 1 for s in summaries)
  choose(browser, 'select.filter', '')
  assert set(column(browser, 'T')) == {'0', '1'}


def test_controls_choose_points_and_the_frontier_follows(browser, summaries):
  hot = [s for s in summaries if s.temperature == 1.0]
  choose(browser, '#temperature', '1')
  place = lambda s: (pytest.approx(1e3 / s.tokens_per_second), pytest.approx(s.quality))
  assert drawn(browser) == [place(s) for s in sorted(hot, key=lambda s: -s.tokens_per_second)]
  best = [(1e3 / s.tokens_per_second, s.quality) for s in frontier.undominated(hot)]
  alone = frontier.target_alone(hot)
  if not any(frontier.dominates((s.tokens_per_second, s.quality), alone) for s in hot):
    best.append((1e3 / alone[0], alone[1]))
  assert drawn(browser, ['nothing beats']) == [pytest.approx(pair) for pair in sorted(best)]

  budget = lambda: browser.execute_script("""
      return document.getElementById('explorer-plot').layout.shapes.map((line) => line.y0);""")
  assert budget() == [45.0]  # 10 % below the target's 50
  choose(browser, '#up', 'tau')
  assert budget() == []
  choose(browser, '#up', 'quality')
  choose(browser, '#rule', 'lossless')
  assert len(drawn(browser)) == sum(s.lossless for s in hot) < len(hot)
  choose(browser, '#rule', 'linear')
  assert len(drawn(browser)) == 2
  choose(browser, '#shape', 'γ = 3')
  assert not drawn(browser)
  assert 'No setting is like that' in browser.find_element('id', 'shown').text
  choose(browser, '#rule', '')
  choose(browser, '#across', 'speedup')
  choose(browser, '#up', 'tau')
  short = [(s.speedup_measured, s.block_efficiency) for s in hot if s.gamma == 3]
  assert drawn(browser) == [pytest.approx(pair) for pair in sorted(short)]
  for element, value in (('#shape', ''), ('#across', 'ms'), ('#up', 'quality')):
    choose(browser, element, value)


def test_a_point_tells_its_whole_setting(browser, summaries):
  from selenium.webdriver import ActionChains
  choose(browser, '#temperature', '1')
  choose(browser, '#rule', 'block')  # a single point
  block, = [s for s in summaries if s.rule == 'block']
  circles = lambda browser: [
      point for point in browser.find_elements('css selector', '#explorer-plot path.point')
      if 'A' in point.get_attribute('d')]  # not the star, which is made of straight lines
  wait(browser).until(lambda browser: len(circles(browser)) == 1)
  point, = circles(browser)
  browser.execute_script("arguments[0].scrollIntoView({block: 'center'});", point)
  ActionChains(browser).move_to_element(point).perform()
  told = wait(browser).until(lambda browser: browser.find_elements(
      'css selector', '#explorer-plot .hoverlayer .hovertext'))[0].text
  for text in (block.method, 'rule block', 'lossless', f'{block.speedup_measured:.2f}x',
               f'predicted {block.speedup_predicted:.2f}x', 'accuracy 51.0 %, target 50.0 %'):
    assert text in told
  choose(browser, '#rule', '')


def test_samples_are_chosen_by_prompt_and_temperature(browser):
  shown = lambda: [(sample.get_attribute('data-prompt'), sample.get_attribute('data-temperature'))
                   for sample in browser.find_elements('css selector', '.sample')
                   if sample.is_displayed()]
  assert shown() == [('1', None), ('1', '0'), ('1', '0')]
  choose(browser, '#sample-prompt', '2')
  choose(browser, '#sample-temperature', '1')
  assert shown() == [('2', None), ('2', '1'), ('2', '1')]
  drafted, own = (browser.find_element('css selector', f'.text .{kind}')
                  for kind in ('drafted', 'own'))
  look = lambda span, name: span.value_of_css_property(name)
  assert 'underline' in look(drafted, 'text-decoration-line') and look(own, 'font-weight') == '700'
  assert 'underline' not in look(own, 'text-decoration-line')
  assert EVIL in [span.get_attribute('textContent') for span in browser.find_elements(
      'css selector', '.text span')]
  assert browser.title == 'imaginary: speculative decoding of stdlib_docs'  # nothing changed it


@pytest.mark.parametrize('width', [1280, 390])
def test_it_fits_the_window(browser, tmp_path, width):
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
      width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
  try:
    widest = lambda browser: browser.execute_script("""
        const plots = document.querySelectorAll('.pair .main-svg, #explorer-plot .main-svg');
        return Math.max(document.documentElement.scrollWidth,
                        ...[...plots].map((plot) => plot.getBoundingClientRect().right));""")
    wait(browser).until(lambda browser: widest(browser) <= width)
    browser.execute_script('window.scrollTo(0, 0)')
    assert browser.save_screenshot(str(tmp_path / 'page.png'))
    from PIL import Image
    with Image.open(tmp_path / 'page.png') as image:
      assert image.width == width and len(image.convert('L').getcolors()) > 50
  finally:
    browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_the_page_is_silent(browser):
  """After all of the above: no error on the console, nothing fetched, no offer to upload."""
  assert browser.get_log('browser') == []
  messages = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
  asked = {message['params']['request']['url'].partition(':')[0] for message in messages
           if message['method'] == 'Network.requestWillBeSent'}
  assert 'file' in asked and asked <= {'file', 'data', 'blob'}
  titles = [button.get_attribute('data-title') for button in browser.find_elements(
      'css selector', '.modebar-btn')]
  assert titles and not [title for title in titles if 'Share' in title or 'Plotly' in title]
