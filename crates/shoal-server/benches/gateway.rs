//! What the gateway adds on loopback: the same client and worker, directly over the Unix socket and through the gateway.
//!
//! `one_request`: a small request and answer after another on one connection. `256_streams`: streams that get an event
//! every 50 ms each; an event carries the moment it was written, and its delay is measured when it is read.
//!
//! `cargo bench -p shoal-server --bench gateway [-- --out FILE]`; without `--bench` (as in `cargo test --benches`) only a
//! few rounds, to see that it works.
#![expect(clippy::print_stdout, reason = "a bench prints")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::http::Request;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use shoal_server::gateway::Settings;
use support::{FakeModels, Server};

/// What both routes take: a request that lacks its text is refused before it is passed on.
const BODY: &str = r#"{"model":"chat","stream":true,"prompt":"A shoal","messages":[{"role":"user","content":"How deep does a shoal swim?"}]}"#;
const EVENT_EVERY: Duration = Duration::from_millis(50);

#[derive(Clone, Copy)]
struct Scale {
    requests: usize,
    streams: usize,
    events: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Direct,
    Gateway,
}

struct Bench {
    models: Arc<FakeModels>,
    server: Server,
    began: Instant,
}

impl Bench {
    async fn connect(&self, way: Way) -> SendRequest<Full<Bytes>> {
        if way == Way::Direct {
            let stream =
                tokio::net::UnixStream::connect(self.models.socket("worker")).await.expect("a worker");
            let (sender, driver) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
            tokio::spawn(driver);
            return sender;
        }
        let stream = tokio::net::TcpStream::connect(self.server.address).await.expect("a server");
        stream.set_nodelay(true).expect("a socket");
        let (sender, driver) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(driver);
        sender
    }

    fn request(&self, path: &str) -> Request<Full<Bytes>> {
        let request = Request::post(path).header("host", self.server.address.to_string());
        request.header("content-type", "application/json").body(Full::new(BODY.into())).expect("a request")
    }

    /// Microseconds of each request.
    async fn one_request(&self, way: Way, count: usize) -> Vec<f64> {
        let mut sender = self.connect(way).await;
        let mut times = Vec::with_capacity(count);
        for round in 0..count + count / 10 {
            let began = Instant::now();
            sender.ready().await.expect("open");
            let answer = sender.send_request(self.request("/v1/completions")).await.expect("an answer");
            let answer = answer.into_body().collect().await.expect("whole").to_bytes();
            assert_eq!(answer.len(), 400);
            if round >= count / 10 {
                times.push(began.elapsed().as_secs_f64() * 1e6);
            }
        }
        times
    }

    /// Microseconds from writing each event to reading it.
    async fn streams(&self, way: Way, scale: Scale) -> Vec<f64> {
        let one = |index: usize| async move {
            // Not all at once: spread over the time between two events.
            let spread = EVENT_EVERY.mul_f64(index as f64 / scale.streams as f64);
            tokio::time::sleep(spread).await;
            let mut sender = self.connect(way).await;
            let answer = sender.send_request(self.request("/v1/chat/completions")).await.expect("an answer");
            let mut body = answer.into_body();
            let mut delays = Vec::new();
            while let Some(frame) = body.frame().await {
                let now = self.began.elapsed().as_secs_f64() * 1e6;
                let data = frame.expect("whole").into_data().unwrap_or_default();
                for line in data.split(|byte| *byte == b'\n').filter(|line| line.starts_with(b"data: ")) {
                    let written: f64 =
                        std::str::from_utf8(&line[6..]).expect("text").parse().expect("a number");
                    delays.push(now - written);
                }
            }
            assert_eq!(delays.len(), scale.events as usize);
            delays
        };
        let all: Vec<Vec<f64>> =
            stream::iter(0..scale.streams).map(one).buffer_unordered(scale.streams).collect().await;
        all.concat()
    }
}

fn worker(began: Instant, events: u32) -> Router {
    let answer = || async { "x".repeat(400) };
    let chat = move || async move {
        let pieces = stream::unfold(0, move |number| async move {
            if number == events {
                return None;
            }
            if number > 0 {
                tokio::time::sleep(EVENT_EVERY).await;
            }
            let event = format!("data: {}\n\n", began.elapsed().as_secs_f64() * 1e6);
            Some((Ok::<_, std::io::Error>(Bytes::from(event)), number + 1))
        });
        ([("content-type", "text/event-stream")], Body::from_stream(pieces))
    };
    Router::new()
        .route("/v1/completions", axum::routing::post(answer))
        .route("/v1/chat/completions", axum::routing::post(chat))
}

fn at(sorted: &[f64], part: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index within the list")]
    let index = ((sorted.len() - 1) as f64 * part).round() as usize;
    sorted[index]
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let in_earnest = arguments.iter().any(|argument| argument == "--bench");
    let scale = if in_earnest {
        Scale { requests: 5000, streams: 256, events: 60 }
    } else {
        Scale { requests: 20, streams: 8, events: 3 }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let rows = runtime.block_on(measure(scale));
    if let Some(out) =
        arguments.iter().position(|argument| argument == "--out").and_then(|at| arguments.get(at + 1))
    {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows })).expect("plain data");
        std::fs::write(out, text + "\n").expect("written");
    }
}

async fn measure(scale: Scale) -> Vec<serde_json::Value> {
    let models = FakeModels::new();
    let began = Instant::now();
    support::worker(&models, "worker", worker(began, scale.events));
    let server = support::start(Arc::clone(&models), "", false, Settings::default()).await;
    let bench = Bench { models, server, began };
    let mut rows = Vec::new();
    for (case, targets) in [("one_request", [None, None]), ("256_streams", [Some(300.0), Some(1000.0)])] {
        let mut figures = Vec::new();
        for way in [Way::Direct, Way::Gateway] {
            let mut times = match case {
                "one_request" => bench.one_request(way, scale.requests).await,
                _ => bench.streams(way, scale).await,
            };
            times.sort_by(f64::total_cmp);
            let name = if way == Way::Direct { "direct" } else { "gateway" };
            println!(
                "{case:<12} {name:<8} p50 {:>8.0} us  p99 {:>8.0} us  max {:>8.0} us  ({} samples)",
                at(&times, 0.5),
                at(&times, 0.99),
                at(&times, 1.0),
                times.len()
            );
            figures.push(times);
        }
        for (metric, part, wanted) in [("added_p50", 0.5, targets[0]), ("added_p99", 0.99, targets[1])] {
            let added = at(&figures[1], part) - at(&figures[0], part);
            // Nothing is faster through the gateway: the clients' own noise is more than what it adds, and tells nothing.
            let target = wanted.filter(|_| added >= 0.0);
            println!("{case:<12} {metric:<8} {added:>8.0} us");
            rows.push(serde_json::json!({
                "case": case, "metric": metric, "value": added.round(), "unit": "us", "better": "lower",
                "ceiling": at(&figures[0], part).round(), "peer": null, "peer_value": null, "target": target,
                "met": target.map(|target: f64| added <= target), "samples": figures[1].len(),
                "spread": [at(&figures[1], 0.0).round(), at(&figures[1], 1.0).round()],
            }));
        }
    }
    rows
}
