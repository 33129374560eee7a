//! The drawing of a sweep: simulated time to commit and the lower bound over the values. One SVG file that needs nothing else
//! and is legible on light and on dark.

use std::fmt::Write as _;

use super::Point;
use crate::table::seconds_text;

const STYLE: &str = "
  svg { --page: #ffffff; --ink: #1c1d21; --soft: #5b5e66; --line: #dcdcd8; --time: #2a66c4; --bound: #b3470f; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #141518; --ink: #e8e8ea; --soft: #a3a6ae; --line: #363941; --time: #6ba2f0; --bound: #f0975a; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--soft); }
  .page { fill: var(--page); } .title { font-size: 16px; font-weight: 600; fill: var(--ink); } .grid { stroke: var(--line); }
  .time { stroke: var(--time); stroke-width: 2; fill: none; } .dot { fill: var(--time); } .figure { fill: var(--ink); }
  .bound { stroke: var(--bound); stroke-width: 2; stroke-dasharray: 6 4; fill: none; } .bound-dot { fill: var(--bound); }
";

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 40.0;
const TOP: f64 = 92.0;
const BOTTOM: f64 = 56.0;

/// Draws the points at equal distances, in their order; the axis of seconds begins at 0. The text of a sweep comes from the
/// command line and is escaped.
pub(super) fn draw(param: &str, cluster: &str, points: &[Point]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n<style>{STYLE}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    text(&mut svg, "title", "start", 16.0, 28.0, &format!("Time to commit by {param}, simulated"));
    text(&mut svg, "", "start", 16.0, 48.0, cluster);
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    let most =
        points.iter().map(|point| point.simulated_seconds.max(point.bound_seconds)).fold(0.0, f64::max);
    let (step, steps) = ticks(most);
    let y = |seconds: f64| bottom - (bottom - TOP) * seconds / (step * f64::from(steps));
    for tick in 0..=steps {
        let seconds = step * f64::from(tick);
        let at = y(seconds);
        let _ = writeln!(svg, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>");
        let label = if tick == 0 { "0 s".to_owned() } else { seconds_text(seconds) };
        text(&mut svg, "", "end", LEFT - 8.0, at + 4.0, &label);
    }
    let between = (right - LEFT - 60.0) / points.len().saturating_sub(1).max(1) as f64;
    // A single point stands in the middle.
    let first = if points.len() == 1 { f64::midpoint(LEFT, right) } else { LEFT + 30.0 };
    let x = |place: usize| first + between * place as f64;
    for (class, dot, of) in [
        ("bound", "bound-dot", (|point| point.bound_seconds) as fn(&Point) -> f64),
        ("time", "dot", |point| point.simulated_seconds),
    ] {
        let at = points.iter().enumerate().map(|(place, point)| (x(place), y(of(point))));
        let line: Vec<String> = at.clone().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", line.join(" "));
        for (x, y) in at {
            let _ = writeln!(svg, "<circle class=\"{dot}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\"/>");
        }
    }
    for (place, point) in points.iter().enumerate() {
        let seconds = seconds_text(point.simulated_seconds);
        text(&mut svg, "figure", "middle", x(place), y(point.simulated_seconds) - 9.0, &seconds);
        text(&mut svg, "", "middle", x(place), bottom + 20.0, &point.value);
    }
    for (place, class, name) in [(0.0, "time", "simulated"), (120.0, "bound", "lower bound")] {
        let (from, to) = (16.0 + place, 40.0 + place);
        let _ = writeln!(svg, "<path class=\"{class}\" d=\"M{from} 66H{to}\"/>");
        text(&mut svg, "", "start", to + 6.0, 70.0, name);
    }
    text(&mut svg, "", "middle", f64::midpoint(LEFT, right), HEIGHT - 14.0, param);
    svg + "</svg>\n"
}

/// A round step, and how many of them reach `most`; at least one.
fn ticks(most: f64) -> (f64, u32) {
    if most <= 0.0 || !most.is_finite() {
        return (1.0, 1);
    }
    let magnitude = 10f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|by| by * magnitude).into_iter().find(|step| most / step <= 6.0);
    let step = step.unwrap_or(10.0 * magnitude);
    (step, (most / step).ceil().max(1.0) as u32)
}

fn text(svg: &mut String, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    let _ = writeln!(svg, "<text{class} x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_reach_the_most_with_few_round_steps() {
        for most in [1e-9, 0.1, 0.3, 1.0, 1.21, 6.0, 59.9, 1e6] {
            let (step, steps) = ticks(most);
            assert!(
                step * f64::from(steps) >= most * 0.999_999 && (1..=7).contains(&steps),
                "{most}: {step} {steps}"
            );
        }
        assert_eq!(ticks(0.0), (1.0, 1));
    }
}
