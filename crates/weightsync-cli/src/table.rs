//! Figures and tables for a person.

/// Bytes with a decimal unit, three digits.
pub(crate) fn bytes_text(bytes: impl Into<u128>) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes.into() as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let digits = if unit == 0 || value >= 99.95 { 0 } else { 2 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Seconds with a unit that leaves at most three digits before the point.
pub(crate) fn seconds_text(seconds: f64) -> String {
    match seconds {
        s if s >= 99.5 => format!("{s:.0} s"),
        s if s >= 0.995 => format!("{s:.2} s"),
        s if s >= 0.000_995 => format!("{:.1} ms", s * 1e3),
        s => format!("{:.0} us", s * 1e6),
    }
}

/// A table with right-aligned columns.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new(header: &[&str]) -> Self {
        Self { rows: vec![header.iter().map(|&cell| cell.to_owned()).collect()] }
    }

    pub(crate) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut lines: Vec<String> = self
            .rows
            .iter()
            .map(|row| {
                let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}"));
                cells.collect::<Vec<_>>().join("  ")
            })
            .collect();
        let rule = widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("  ");
        lines.insert(1.min(lines.len()), rule);
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_three_digits() {
        for (bytes, text) in [
            (0_u128, "0 B"),
            (999, "999 B"),
            (1000, "1.00 kB"),
            (1_234_567, "1.23 MB"),
            (999_999_999, "1.00 GB"),
            (17_900_000_000_000_000, "17.90 PB"),
            (27_914_700_000_000_000_000, "27.91 EB"),
            (4_000_000_000_000_000_000_000, "4000 EB"),
        ] {
            assert_eq!(bytes_text(bytes), text);
        }
        for (seconds, text) in
            [(0.0, "0 us"), (0.0012, "1.2 ms"), (0.9999, "1.00 s"), (12.345, "12.35 s"), (100.0, "100 s")]
        {
            assert_eq!(seconds_text(seconds), text);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(&["a", "long"]);
        table.row(vec!["100".into(), "1".into()]);
        assert_eq!(table.render(), "  a  long\n---  ----\n100     1");
    }
}
