//! The two text formats of metrics: OpenMetrics for those who ask for it, and the older one of Prometheus for everyone
//! else.
//!
//! They differ in a few lines. In the older format a counter's family has the name of its samples, which end in `_total`;
//! there are no units and no mark of the end; kinds of metrics that it does not know are gauges or untyped; a quote in
//! a help text is not escaped; and samples have no exemplars.

use std::fmt::Write as _;

/// How metrics are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exposition {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// The text format of Prometheus, 0.0.4.
    Text,
}

impl Exposition {
    /// What the header `accept` prefers. Without a preference for OpenMetrics it is the other: all that scrape can read that.
    pub(super) fn preferred(accept: &str) -> Self {
        let mut open_metrics: f32 = 0.0;
        // By how specific the range is that covers it.
        let mut text: [Option<f32>; 3] = [None; 3];
        for range in accept.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default().to_ascii_lowercase();
            let mut parameters = parts.filter_map(|part| part.split_once('='));
            let quality = parameters
                .clone()
                .find(|(name, _)| name.trim().eq_ignore_ascii_case("q"))
                .map_or(1.0, |(_, value)| value.trim().parse().unwrap_or(0.0));
            let version = parameters.find(|(name, _)| name.trim().eq_ignore_ascii_case("version"));
            let version = version.map(|(_, version)| version.trim().trim_matches('"'));
            match &*kind {
                "application/openmetrics-text"
                    if version.is_none_or(|version| ["1.0.0", "0.0.1"].contains(&version)) =>
                {
                    open_metrics = open_metrics.max(quality);
                }
                "text/plain" if version.is_none_or(|version| version == "0.0.4") => {
                    text[0] = Some(text[0].unwrap_or(0.0).max(quality));
                }
                "text/*" => text[1] = Some(quality),
                "*/*" => text[2] = Some(quality),
                _ => {}
            }
        }
        let text = text.into_iter().flatten().next().unwrap_or(0.0);
        match open_metrics > 0.0 && open_metrics >= text {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    pub(super) fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// `open_metrics`, in this format.
    pub(super) fn write(self, open_metrics: String) -> String {
        match self {
            Self::OpenMetrics => open_metrics,
            Self::Text => as_text(&open_metrics),
        }
    }
}

/// What OpenMetrics writes before a family's samples.
#[derive(Default)]
struct Family<'a> {
    name: &'a str,
    help: Option<&'a str>,
}

fn as_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut family = Family::default();
    for line in open_metrics.lines() {
        let Some(comment) = line.strip_prefix("# ") else {
            write_sample(&mut text, line);
            continue;
        };
        let mut words = comment.splitn(3, ' ');
        match (words.next(), words.next(), words.next()) {
            // The type says under which name the help belongs.
            (Some("HELP"), Some(name), help) => family = Family { name, help },
            (Some("TYPE"), Some(name), Some(kind)) => {
                let help = family.help.take().filter(|_| family.name == name);
                write_family(&mut text, name, help, kind);
            }
            // UNIT, EOF.
            _ => {}
        }
    }
    text
}

fn write_family(text: &mut String, name: &str, help: Option<&str>, kind: &str) {
    let (suffix, kind) = match kind {
        "counter" => ("_total", "counter"),
        "info" => ("_info", "gauge"),
        "gauge" | "stateset" => ("", "gauge"),
        "histogram" => ("", "histogram"),
        "summary" => ("", "summary"),
        // Gauge histograms, and what is not known.
        _ => ("", "untyped"),
    };
    // Writing to a string does not fail.
    if let Some(help) = help {
        let _ = writeln!(text, "# HELP {name}{suffix} {}", help.replace("\\\"", "\""));
    }
    let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
}

/// A sample without its exemplar, which begins after a `#` that is in no label.
fn write_sample(text: &mut String, line: &str) {
    let (mut quoted, mut escaped) = (false, false);
    let exemplar = line.char_indices().find(|(_, c)| {
        match c {
            '"' if !escaped => quoted = !quoted,
            '#' if !quoted => return true,
            _ => {}
        }
        escaped = *c == '\\' && !escaped;
        false
    });
    let sample = exemplar.map_or(line, |(at, _)| line[..at].trim_end());
    text.push_str(sample);
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scraper_gets_what_it_asks_for() {
        use Exposition::{OpenMetrics, Text};
        for (accept, expected) in [
            ("", Text),
            ("*/*", Text),
            ("text/plain;version=0.0.4", Text),
            ("text/html, */*;q=0.1", Text),
            ("application/json", Text),
            ("application/openmetrics-text", OpenMetrics),
            ("application/openmetrics-text; version=\"1.0.0\"; charset=utf-8", OpenMetrics),
            ("application/openmetrics-text;version=9.0.0", Text),
            ("application/openmetrics-text;q=0", Text),
            (
                "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                OpenMetrics,
            ),
            ("application/openmetrics-text;version=1.0.0;q=0.2,text/plain;version=0.0.4;q=0.3", Text),
            ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", Text),
            ("application/openmetrics-text;q=high, text/plain", Text),
        ] {
            assert_eq!(Exposition::preferred(accept), expected, "{accept}");
        }
    }

    #[test]
    fn the_older_format_has_the_same_samples() {
        let open_metrics = r##"# HELP requests Requests "answered"
# TYPE requests counter
requests_total{method="a#b",text="\"#"} 3 # {trace="x"} 1.0
requests_total{method="c"} 4
# HELP latency_seconds From \"here\" to there
# TYPE latency_seconds histogram
# UNIT latency_seconds seconds
latency_seconds_sum 0.5
latency_seconds_count 2
latency_seconds_bucket{le="0.1"} 1 # {} 0.05
latency_seconds_bucket{le="+Inf"} 2
# HELP build Build
# TYPE build info
build_info{version="1"} 1
# TYPE odd unknown
odd 1
# HELP term Current term
# TYPE term gauge
term 3
# EOF
"##;
        let text = r##"# HELP requests_total Requests "answered"
# TYPE requests_total counter
requests_total{method="a#b",text="\"#"} 3
requests_total{method="c"} 4
# HELP latency_seconds From "here" to there
# TYPE latency_seconds histogram
latency_seconds_sum 0.5
latency_seconds_count 2
latency_seconds_bucket{le="0.1"} 1
latency_seconds_bucket{le="+Inf"} 2
# HELP build_info Build
# TYPE build_info gauge
build_info{version="1"} 1
# TYPE odd untyped
odd 1
# HELP term Current term
# TYPE term gauge
term 3
"##;
        assert_eq!(Exposition::Text.write(open_metrics.to_owned()), text);
        assert_eq!(Exposition::OpenMetrics.write(open_metrics.to_owned()), open_metrics);
    }
}
