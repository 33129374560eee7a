//! Plots as SVG text: self-contained, legible on light and dark pages, without a library.
//!
//! What is drawn is exactly the numbers given; no smoothing, and axes of amounts begin at 0.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = 56.0;

/// Rows of a heat map; neighbours beyond are put together, so that each stays high enough to be seen.
const ROWS_MAX: usize = 64;

/// Columns of a heat map.
const COLUMNS: usize = 100;

const STYLE: &str = "<style>
svg { --ink: #1b1f24; --paper: #ffffff; --grid: #d0d7de; --mark: #0b62c4; --limit: #b35900 }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --paper: #0d1117; --grid: #3d444d; --mark: #6cb2ff; --limit: #ffb061 }
}
text { font: 13px system-ui, sans-serif; fill: var(--ink) }
.title { font-size: 16px; font-weight: 600 }
.grid { stroke: var(--grid); stroke-width: 1 }
.line { stroke: var(--mark); stroke-width: 2; fill: none }
.bar { stroke: var(--mark); stroke-width: 1.5 }
.mark { fill: var(--mark) }
.limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4 }
.limit-text { fill: var(--limit) }
</style>";

/// A figure at one place of the x axis: its median, least and most.
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) label: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// One line over an x axis of powers of two.
pub(crate) struct LineChart<'a> {
    pub(crate) title: &'a str,
    pub(crate) x_title: &'a str,
    pub(crate) y_title: &'a str,
    pub(crate) points: &'a [Point],
    /// A line across, and what it means.
    pub(crate) limit: Option<(f64, &'a str)>,
}

impl LineChart<'_> {
    pub(crate) fn draw(&self) -> String {
        let mut svg = open(self.title, HEIGHT);
        let limit = self.limit.map(|(y, _)| y);
        let most = self.points.iter().map(|point| point.max).chain(limit).fold(0.0, f64::max);
        let (step, steps) = ticks(most);
        let (top, bottom) = (TOP, HEIGHT - BOTTOM);
        let y = |value: f64| bottom - (bottom - top) * value / (step * steps as f64);
        let logs: Vec<f64> = self.points.iter().map(|point| point.x.max(1.0).log2()).collect();
        let (least, widest) = (fold(&logs, f64::min), fold(&logs, f64::max));
        // A single point stands in the middle.
        let x = |log: f64| {
            let share = if widest > least { (log - least) / (widest - least) } else { 0.5 };
            LEFT + 24.0 + (WIDTH - LEFT - RIGHT - 48.0) * share
        };
        for tick in 0..=steps {
            let value = step * tick as f64;
            line(&mut svg, "grid", [LEFT, y(value), WIDTH - RIGHT, y(value)]);
            text(&mut svg, "", "end", LEFT - 8.0, y(value) + 4.0, &short(value));
        }
        let mut path = String::new();
        for (point, &log) in self.points.iter().zip(&logs) {
            let (at, high) = (x(log), y(point.median));
            line(&mut svg, "bar", [at, y(point.min), at, y(point.max)]);
            let _ = write!(svg, "<circle class=\"mark\" cx=\"{at:.1}\" cy=\"{high:.1}\" r=\"4\"/>");
            text(&mut svg, "", "middle", at, y(point.max).min(high - 6.0) - 6.0, &short(point.median));
            text(&mut svg, "", "middle", at, bottom + 20.0, &point.label);
            let _ = write!(path, "{at:.1},{high:.1} ");
        }
        let _ = writeln!(svg, "<polyline class=\"line\" points=\"{}\"/>", path.trim_end());
        if let Some((value, meaning)) = self.limit {
            line(&mut svg, "limit", [LEFT, y(value), WIDTH - RIGHT, y(value)]);
            text(&mut svg, "limit-text", "end", WIDTH - RIGHT, y(value) - 6.0, meaning);
        }
        text(&mut svg, "", "start", 16.0, 48.0, self.y_title);
        text(&mut svg, "", "middle", f64::midpoint(LEFT, WIDTH - RIGHT), HEIGHT - 14.0, self.x_title);
        svg + "</svg>\n"
    }
}

/// Amounts that grew over time, one row each: drawn as the rate at every moment.
pub(crate) struct HeatMap<'a> {
    pub(crate) title: &'a str,
    pub(crate) subtitle: &'a str,
    /// A name, and how much there was by which second.
    pub(crate) rows: &'a [(String, Vec<(f64, f64)>)],
    /// Of the amount.
    pub(crate) unit: &'a str,
}

impl HeatMap<'_> {
    pub(crate) fn draw(&self) -> String {
        let end = self.rows.iter().filter_map(|(_, samples)| end_of(samples)).fold(0.0, f64::max);
        let width_s = (end / COLUMNS as f64).max(f64::MIN_POSITIVE);
        let rows = grouped(self.rows, width_s);
        let most = rows.iter().flat_map(|(_, rates)| rates).copied().fold(0.0, f64::max);
        let row_high = (240.0 / rows.len().max(1) as f64).clamp(10.0, 40.0);
        let (top, bottom) = (TOP, TOP + row_high * rows.len() as f64);
        let height = bottom + BOTTOM + 44.0;
        let mut svg = open(self.title, height);
        text(&mut svg, "", "start", 16.0, 48.0, self.subtitle);
        let cell = (WIDTH - LEFT - RIGHT) / COLUMNS as f64;
        // As many names as fit above each other.
        let every = (16.0 / row_high).ceil() as usize;
        for (row, (name, rates)) in rows.iter().enumerate() {
            let y = top + row_high * row as f64;
            if row % every.max(1) == 0 {
                text(&mut svg, "", "end", LEFT - 8.0, y + f64::midpoint(row_high, 8.0), name);
            }
            for (column, &rate) in rates.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
                let x = LEFT + cell * column as f64;
                // The gap between rows tells ranks apart.
                let (wide, high) = (cell, row_high - 1.0);
                let _ = write!(
                    svg,
                    "<rect class=\"mark\" x=\"{x:.2}\" y=\"{y:.1}\" width=\"{wide:.2}\" height=\"{high:.1}\" \
                     shape-rendering=\"crispEdges\" fill-opacity=\"{:.2}\"/>",
                    shade(rate / most)
                );
            }
            svg.push('\n');
        }
        let (step, steps) = ticks(end * 1e3);
        for tick in 0..=steps {
            let ms = step * tick as f64;
            let x = LEFT + (WIDTH - LEFT - RIGHT) * ms / (end * 1e3).max(f64::MIN_POSITIVE);
            if x <= WIDTH - RIGHT + 1.0 {
                line(&mut svg, "grid", [x, bottom, x, bottom + 5.0]);
                text(&mut svg, "", "middle", x, bottom + 20.0, &short(ms));
            }
        }
        text(&mut svg, "", "middle", f64::midpoint(LEFT, WIDTH - RIGHT), bottom + 40.0, "milliseconds");
        self.legend(&mut svg, bottom + 62.0, most);
        svg + "</svg>\n"
    }

    fn legend(&self, svg: &mut String, y: f64, most: f64) {
        let boxes = 5;
        for nth in 1..=boxes {
            let share = f64::from(nth) / f64::from(boxes);
            let x = LEFT + 110.0 * f64::from(nth - 1);
            let _ = write!(
                svg,
                "<rect class=\"mark\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"22\" height=\"14\" fill-opacity=\"{:.2}\"/>",
                shade(share)
            );
            text(svg, "", "start", x + 28.0, y + 12.0, &format!("{} {}/s", short(most * share), self.unit));
        }
    }
}

/// When the amount last grew.
fn end_of(samples: &[(f64, f64)]) -> Option<f64> {
    let total = samples.last()?.1;
    samples.iter().find(|sample| sample.1 >= total).map(|sample| sample.0)
}

/// The rates of each row per column, neighbours put together where there are too many.
fn grouped(rows: &[(String, Vec<(f64, f64)>)], width_s: f64) -> Vec<(String, Vec<f64>)> {
    let group = rows.len().div_ceil(ROWS_MAX).max(1);
    let mean = |chunk: &[(String, Vec<(f64, f64)>)]| {
        let all: Vec<Vec<f64>> = chunk.iter().map(|(_, samples)| rates(samples, width_s)).collect();
        let column = |at: usize| all.iter().filter_map(|rates| rates.get(at)).sum::<f64>() / all.len() as f64;
        (0..COLUMNS).map(column).collect()
    };
    let name = |chunk: &[(String, Vec<(f64, f64)>)]| match chunk {
        [(first, _), .., (last, _)] => format!("{first} .. {last}"),
        [(only, _)] => only.clone(),
        [] => String::new(),
    };
    rows.chunks(group).map(|chunk| (name(chunk), mean(chunk))).collect()
}

/// What an amount grew by in each column, per second. Together the columns have all of it.
fn rates(samples: &[(f64, f64)], width_s: f64) -> Vec<f64> {
    let at = |column: usize| amount_at(samples, width_s * column as f64);
    (0..COLUMNS).map(|column| (at(column + 1) - at(column)) / width_s).collect()
}

/// The amount at a moment, between two samples by proportion.
fn amount_at(samples: &[(f64, f64)], second: f64) -> f64 {
    let after = samples.partition_point(|sample| sample.0 <= second);
    match (after.checked_sub(1).and_then(|before| samples.get(before)), samples.get(after)) {
        (Some(&(t0, a0)), Some(&(t1, a1))) => a0 + (a1 - a0) * (second - t0) / (t1 - t0),
        (Some(&(_, amount)), None) => amount,
        (None, _) => 0.0,
    }
}

/// A rate of almost nothing can still be told from nothing.
fn shade(share: f64) -> f64 {
    0.08 + 0.92 * share.clamp(0.0, 1.0)
}

/// The distance of ticks and how many it takes to pass `most`: 4 to 10 of 1, 2 or 5 times a power of ten.
fn ticks(most: f64) -> (f64, usize) {
    if !(most.is_finite() && most > 0.0) {
        return (1.0, 1);
    }
    let power = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| most / step <= 6.0);
    let step = step.unwrap_or(10.0 * power);
    (step, (most / step).ceil() as usize)
}

fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 0.1 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn fold(values: &[f64], choose: fn(f64, f64) -> f64) -> f64 {
    values.iter().copied().reduce(choose).unwrap_or(0.0)
}

fn open(title: &str, height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" \
         height=\"{height:.0}\" role=\"img\">\n<title>{}</title>\n{STYLE}\n\
         <rect width=\"100%\" height=\"100%\" fill=\"var(--paper)\"/>\n",
        escaped(title)
    );
    text(&mut svg, "title", "start", 16.0, 26.0, title);
    svg
}

fn line(svg: &mut String, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
    let _ = writeln!(
        svg,
        "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
    );
}

fn text(svg: &mut String, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
    let text = escaped(text);
    let _ = writeln!(
        svg,
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_columns_together_have_the_whole_amount(steps in prop::collection::vec((0.001..0.5f64, 0u32..100), 1..40)) {
            let mut samples = vec![(0.0, 0.0)];
            for (seconds, more) in steps {
                let (t, amount) = samples[samples.len() - 1];
                samples.push((t + seconds, amount + f64::from(more)));
            }
            let total = samples[samples.len() - 1].1;
            let width = samples[samples.len() - 1].0 / COLUMNS as f64;
            let sum: f64 = rates(&samples, width).iter().map(|rate| rate * width).sum();
            prop_assert!((sum - total).abs() <= 1e-6 * total.max(1.0), "{sum} of {total}");
        }

        #[test]
        fn ticks_pass_the_most_and_are_few(most in 1e-6..1e12f64) {
            let (step, steps) = ticks(most);
            prop_assert!(step * steps as f64 >= most * (1.0 - 1e-9) && (1..=10).contains(&steps));
        }
    }

    #[test]
    fn text_of_a_plot_cannot_become_markup() {
        let svg = HeatMap { title: "<a & \"b\">", subtitle: "", rows: &[], unit: "GB" }.draw();
        assert!(svg.contains("&lt;a &amp; &quot;b&quot;&gt;") && !svg.contains("<a &"));
    }

    #[test]
    fn many_rows_are_put_together() {
        let rows: Vec<_> = (0..200).map(|row| (format!("r{row}"), vec![(0.0, 0.0), (1.0, 1.0)])).collect();
        let grouped = grouped(&rows, 0.01);
        assert_eq!((grouped.len(), grouped[0].0.as_str()), (50, "r0 .. r3"));
        assert!(grouped.iter().all(|(_, rates)| rates.iter().all(|rate| (rate - 1.0).abs() < 1e-9)));
    }
}
