//! The way of a request through the gateway, with a shelf and workers that misbehave on purpose.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::routing::post as on_post;
use futures_util::stream;
use http_body_util::BodyExt;
use support::{FakeModels, ask, get, post, raw_worker, refusal, settings, start, text, until, whole, worker};
use tokio::io::AsyncWriteExt;

const CHAT: &str = "/v1/chat/completions";

fn for_model(model: &str, streamed: bool) -> String {
    format!(r#"{{ "model" : "{model}",  "stream":{streamed}, "messages": [0], "extra": [1.50, "\u00e9"] }}"#)
}

/// Sends what it got back: method, target, headers, body.
async fn mirror(request: Request) -> String {
    let (head, body) = request.into_parts();
    let body = body.collect().await.expect("whole").to_bytes();
    let mut headers: Vec<String> = head
        .headers
        .iter()
        .map(|(name, value)| format!("{name}={}", value.to_str().unwrap_or("?")))
        .collect();
    headers.sort();
    format!("{} {}\n{}\n{}", head.method, head.uri, headers.join("\n"), String::from_utf8_lossy(&body))
}

#[tokio::test]
async fn a_request_passes_unchanged_but_for_what_belongs_to_the_connection() {
    let models = FakeModels::new();
    worker(&models, "worker", Router::new().fallback(mirror));
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let body = for_model("chat", false);
    let headers = [
        support::JSON,
        ("authorization", "Bearer secret"),
        ("x-mine", "1"),
        ("connection", "x-hop"),
        ("x-hop", "2"),
    ];
    let response = ask(server.address, "POST", "/v1/unheard/of?x=1&y=%2F", &headers, body.clone()).await;
    let (status, headers, echo) = whole(response).await;
    let echo = String::from_utf8_lossy(&echo).into_owned();
    assert_eq!(status, 200);
    assert!(echo.starts_with("POST /v1/unheard/of?x=1&y=%2F\n"), "{echo}");
    assert!(echo.ends_with(&format!("\n{body}")), "{echo}");
    assert!(
        echo.contains("\nx-mine=1\n") && echo.contains(&format!("content-length={}", body.len())),
        "{echo}"
    );
    for dropped in ["secret", "x-hop", &server.address.to_string()] {
        assert!(!echo.contains(dropped), "{dropped} passed: {echo}");
    }
    assert_eq!(headers["x-shoal-was-asleep"], "false");
    assert!(headers["x-shoal-wait-ms"].to_str().expect("text").parse::<u64>().is_ok());
    until("the route ends with its answer", || models.sink.ended.load(Ordering::SeqCst) == 1).await;
    assert_eq!(models.sink.first_bytes.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_client_that_writes_to_the_end_hears_that_its_body_is_too_long() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // Far more than the buffers of a connection hold.
    const LENGTH: usize = 16 << 20;
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "request_bytes_max = '64KiB'\n", false, settings()).await;
    let mut client = tokio::net::TcpStream::connect(server.address).await.expect("a server");
    let head = format!(
        "POST {CHAT} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: {LENGTH}\r\n\r\n",
        server.address
    );
    client.write_all(head.as_bytes()).await.expect("it reads");
    client.write_all(&vec![b' '; LENGTH]).await.expect("it reads to the end");
    let mut answer = [0; 12];
    client.read_exact(&mut answer).await.expect("it answers");
    assert_eq!(&answer, b"HTTP/1.1 413");
}

#[tokio::test]
async fn a_refusal_by_the_worker_passes_and_is_no_first_byte() {
    let models = FakeModels::new();
    let refuse = || async { (axum::http::StatusCode::BAD_REQUEST, r#"{"error":{"message":"no"}}"#) };
    worker(&models, "worker", Router::new().route(CHAT, on_post(refuse)));
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let (status, _, body) = whole(post(server.address, CHAT, for_model("chat", true)).await).await;
    assert_eq!((status.as_u16(), body.as_ref()), (400, br#"{"error":{"message":"no"}}"#.as_slice()));
    until("the route ends with its answer", || models.sink.ended.load(Ordering::SeqCst) == 1).await;
    assert_eq!(models.sink.first_bytes.load(Ordering::SeqCst), 0, "it would look like a very fast model");
}

#[tokio::test]
async fn a_stream_passes_byte_for_byte_as_it_comes() {
    let models = FakeModels::new();
    let (send, receive) = tokio::sync::mpsc::channel::<Bytes>(1);
    let receive = Arc::new(tokio::sync::Mutex::new(receive));
    let answer = move || {
        let receive = Arc::clone(&receive);
        async move {
            let pieces = stream::unfold(receive, |receive| async move {
                let piece = receive.lock().await.recv().await?;
                Some((Ok::<_, std::io::Error>(piece), receive))
            });
            ([("content-type", "text/event-stream")], Body::from_stream(pieces))
        }
    };
    worker(&models, "worker", Router::new().route(CHAT, on_post(answer)));
    let server = start(models, "", false, settings()).await;
    let mut response = post(server.address, CHAT, for_model("chat", true)).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut got = Vec::new();
    let mut written = Vec::new();
    for number in 0..50u32 {
        let piece = Bytes::from(format!("data: {{\"n\": {number}, \"x\": \"\u{e9}\r\"}}\n\n"));
        written.extend_from_slice(&piece);
        send.send(piece).await.expect("read");
        // It arrives before the next is written: nothing is held back.
        while got.len() < written.len() {
            let frame =
                tokio::time::timeout(Duration::from_secs(30), response.frame()).await.expect("at once");
            got.extend_from_slice(frame.expect("more").expect("whole").data_ref().expect("data"));
        }
    }
    drop(send);
    assert!(response.frame().await.is_none());
    assert_eq!(got, written);
}

#[tokio::test]
async fn binary_answers_and_statuses_pass_too() {
    let models = FakeModels::new();
    let bytes: Vec<u8> = (0..300_000usize).map(|n| n.wrapping_mul(7).to_le_bytes()[0]).collect();
    let copy = bytes.clone();
    let answer = move || {
        let copy = copy.clone();
        async move { (axum::http::StatusCode::IM_A_TEAPOT, [("x-worker", "yes")], copy) }
    };
    worker(&models, "worker", Router::new().fallback(answer));
    let server = start(models, "", false, settings()).await;
    for _ in 0..3 {
        let (status, headers, body) =
            whole(post(server.address, "/v1/audio", for_model("chat", false)).await).await;
        assert_eq!((status.as_u16(), &headers["x-worker"]), (418, &"yes".parse().expect("a value")));
        assert!(body == bytes, "{} bytes came", body.len());
    }
}

/// Answers with an endless stream; says when somebody stopped reading it.
fn endless(stopped: &Arc<AtomicBool>, written: &Arc<AtomicU64>) -> Router {
    struct Stopped(Arc<AtomicBool>);
    impl Drop for Stopped {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let (stopped, written) = (Arc::clone(stopped), Arc::clone(written));
    let answer = move || {
        let (guard, written) = (Stopped(Arc::clone(&stopped)), Arc::clone(&written));
        async move {
            let pieces = stream::unfold((guard, written), |(guard, written)| async move {
                tokio::time::sleep(Duration::from_micros(200)).await;
                let piece = Bytes::from(vec![b'x'; 16 << 10]);
                written.fetch_add(piece.len() as u64, Ordering::SeqCst);
                Some((Ok::<_, std::io::Error>(piece), (guard, written)))
            });
            ([("content-type", "text/event-stream")], Body::from_stream(pieces))
        }
    };
    Router::new().route(CHAT, on_post(answer))
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_worker() {
    let models = FakeModels::new();
    let (stopped, written) = (Arc::default(), Arc::default());
    worker(&models, "worker", endless(&stopped, &written));
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let mut response = post(server.address, CHAT, for_model("chat", true)).await;
    response.frame().await.expect("some").expect("whole");
    assert!(!stopped.load(Ordering::SeqCst));
    drop(response);
    until("the worker's stream is dropped", || stopped.load(Ordering::SeqCst)).await;
    until("the route ends", || models.sink.ended.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_slow_client_slows_its_worker_and_nothing_piles_up() {
    let models = FakeModels::new();
    let (stopped, written) = (Arc::default(), Arc::<AtomicU64>::default());
    worker(&models, "worker", endless(&stopped, &written));
    let server = start(models, "", false, settings()).await;
    let response = post(server.address, CHAT, for_model("chat", true)).await;
    // The sockets' own buffers take a few MiB; then the worker must stand still.
    let mut before = u64::MAX;
    let deadline = Instant::now() + Duration::from_mins(1);
    while before != written.load(Ordering::SeqCst) {
        assert!(Instant::now() < deadline, "the worker never stood still");
        before = written.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert!(before < 32 << 20, "{before} bytes were taken from the worker");
    drop(response);
}

#[tokio::test]
async fn a_request_for_a_sleeping_model_waits() {
    let models = FakeModels::new();
    worker(&models, "worker", Router::new().fallback(mirror));
    let server = start(models, "", false, settings()).await;
    let asked = Instant::now();
    let (status, headers, _) = whole(post(server.address, CHAT, for_model("slow", false)).await).await;
    let took = asked.elapsed();
    assert_eq!((status.as_u16(), &headers["x-shoal-was-asleep"]), (200, &"true".parse().expect("a value")));
    let waited: u64 = headers["x-shoal-wait-ms"].to_str().expect("text").parse().expect("a number");
    assert!(waited >= 400 && u128::from(waited) <= took.as_millis(), "{waited} ms of {took:?}");
}

/// What the fake says of a wake has a line end in it, and a line that would be data.
const COMMENT: &str = ": waiting for slow (waking, 45 %data: x)\n\n";

#[tokio::test]
async fn a_stream_that_waits_long_begins_with_comments() {
    let models = FakeModels::gated();
    let answer =
        || async { ([("content-type", "text/event-stream")], "data: {\"x\":1}\n\ndata: [DONE]\n\n") };
    worker(&models, "worker", Router::new().fallback(answer));
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let asked = Instant::now();
    let mut response = post(server.address, CHAT, for_model("slow", true)).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    assert_eq!(response.headers()["x-shoal-was-asleep"], "true");
    // The model is not there, and cannot be before these are read: it began early, and goes on.
    for number in 1..=3 {
        let frame = tokio::time::timeout(Duration::from_secs(30), response.frame()).await.expect("in time");
        let comment = frame.expect("some").expect("whole").into_data().expect("data");
        assert_eq!(comment, COMMENT, "number {number}");
    }
    models.open();
    let (_, rest) = text(response).await;
    let (comments, took) = (3 + rest.matches(COMMENT).count(), asked.elapsed());
    assert!(comments as u128 <= 1 + took.as_millis() / 50, "{comments} comments in {took:?}, one in 50 ms");
    assert!(rest.ends_with("data: {\"x\":1}\n\ndata: [DONE]\n\n"), "{rest}");
    assert_eq!(rest.replace(COMMENT, "").matches("data:").count(), 2);
    until("the route ends", || models.sink.ended.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_stream_that_waited_in_vain_ends_with_an_error() {
    let models = FakeModels::gated();
    let patient = start(Arc::clone(&models), "", false, settings()).await;
    let late = post(patient.address, CHAT, for_model("late", true)).await;
    // It has begun: only now can it fail.
    models.open();
    // Long enough that it begins before.
    let server = start(models, "wait_s_max = 4", false, settings()).await;
    let (never, plain) = tokio::join!(
        post(server.address, CHAT, for_model("never", true)),
        post(server.address, CHAT, for_model("never", false))
    );
    for (response, code) in [(late, "model_unavailable"), (never, "model_wait_timeout")] {
        let (status, body) = text(response).await;
        assert_eq!(status, 200, "it had begun");
        let last = body.trim_end().rsplit("\n\n").next().expect("an event");
        let error: serde_json::Value =
            serde_json::from_str(last.strip_prefix("data: ").expect("data")).expect("JSON");
        assert_eq!(error["error"]["code"], code, "{body}");
    }
    let (status, code, _) = refusal(plain).await;
    assert_eq!((status, code.as_str()), (504, "model_wait_timeout"));
}

#[tokio::test]
async fn an_error_of_the_worker_reaches_a_stream_that_had_begun() {
    let models = FakeModels::gated();
    let body = r#"{"error":{"message":"too long","type":"invalid_request_error","code":"context_length_exceeded","param":"messages"}}"#;
    let answer = move || async move { (axum::http::StatusCode::BAD_REQUEST, body) };
    worker(&models, "worker", Router::new().fallback(answer));
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let begun = post(server.address, CHAT, for_model("slow", true)).await;
    models.open();
    let (status, got) = text(begun).await;
    assert_eq!(status, 200, "it had begun");
    assert!(got.ends_with(&format!("data: {body}\n\n")), "{got}");
    let (status, got) = text(post(server.address, CHAT, for_model("chat", true)).await).await;
    assert_eq!((status.as_u16(), got.as_str()), (400, body), "in time, the status is its own");
}

#[tokio::test]
async fn a_client_that_goes_away_while_it_waits_leaves_the_queue() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    for streamed in [true, false] {
        let address = server.address;
        let waiting =
            tokio::spawn(async move { text(post(address, CHAT, for_model("never", streamed)).await).await });
        until("it waits", || models.waiting.load(Ordering::SeqCst) == 1).await;
        tokio::time::sleep(Duration::from_millis(150)).await;
        waiting.abort();
        until("it left", || models.waiting.load(Ordering::SeqCst) == 0).await;
    }
}

#[tokio::test]
async fn refusals_of_the_shelf_have_their_status() {
    let models = FakeModels::new();
    let server = start(models, "", false, settings()).await;
    for streamed in [false, true] {
        for (model, expected, expected_code, retry) in [
            ("nobody", 404, "model_not_found", None),
            ("broken", 503, "model_unavailable", Some("2")),
            ("full", 429, "too_many_waiting", Some("3")),
            ("closing", 503, "shutting_down", None),
        ] {
            let response = post(server.address, CHAT, for_model(model, streamed)).await;
            let after =
                response.headers().get("retry-after").map(|value| value.to_str().expect("text").to_owned());
            assert_eq!(after.as_deref(), retry, "{model}");
            let (status, code, error) = refusal(response).await;
            assert_eq!((status, code.as_str()), (expected, expected_code));
            if model == "nobody" {
                let message = error["message"].as_str().expect("text");
                assert!(message.contains("chat, slow, never"), "{message}");
                assert_eq!(error["param"], "model");
            }
        }
    }
}

#[tokio::test]
async fn bad_requests_are_told_at_once() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "request_bytes_max = '64KiB'", false, settings()).await;
    let long = format!(r#"{{"model":"chat","x":"{}"}}"#, "y".repeat(70_000));
    for (body, expected, expected_code) in [
        ("", 400, "invalid_json"),
        ("{\"model\":", 400, "invalid_json"),
        ("{}", 400, "missing_required_parameter"),
        ("{\"model\":7}", 400, "invalid_type"),
        ("{\"model\":\"slow\"}", 400, "missing_required_parameter"),
        ("{\"model\":\"slow\",\"messages\":[]}", 400, "invalid_value"),
        (long.as_str(), 413, "request_too_large"),
    ] {
        let (status, code, _) = refusal(post(server.address, CHAT, body.to_owned()).await).await;
        assert_eq!((status, code.as_str()), (expected, expected_code), "{body:.40}");
    }
    for (method, path) in [("GET", "/v1/chat/completions"), ("DELETE", "/v1/files/x"), ("GET", "/nowhere")] {
        let (status, code, _) = refusal(ask(server.address, method, path, &[], "").await).await;
        assert_eq!((status, code.as_str()), (404, "unknown_url"), "{method} {path}");
    }
    let (status, code, _) =
        refusal(ask(server.address, "POST", "/v1/models", &[support::JSON], "{}").await).await;
    assert_eq!((status, code.as_str()), (405, "method_not_allowed"));
    assert_eq!(models.routed.load(Ordering::SeqCst), 0, "none of them reached the shelf");
}

#[tokio::test]
async fn an_answer_before_the_body_was_read_says_that_the_connection_closes() {
    let models = FakeModels::new();
    worker(&models, "worker", Router::new().fallback(mirror));
    let server = start(Arc::clone(&models), "request_bytes_max = '64KiB'", false, settings()).await;
    let long = |bytes| format!(r#"{{"model":"chat","messages":[0],"x":"{}"}}"#, "y".repeat(bytes));
    let foreign = [support::JSON, ("origin", "http://elsewhere.example")];
    for (path, headers, body, expected, closes) in [
        // Read to its end and thrown away, so that a client that is still writing hears of it.
        (CHAT, &foreign[..1], long(1_000_000), 413, false),
        (CHAT, &foreign[..], long(1_000_000), 403, true),
        ("/nowhere", &foreign[..1], long(10), 404, true),
        ("/nowhere", &foreign[..1], String::new(), 404, false),
        (CHAT, &foreign[..1], long(10), 200, false),
        (CHAT, &foreign[..1], "{}".to_owned(), 400, false),
    ] {
        let (status, headers, _) = whole(ask(server.address, "POST", path, headers, body).await).await;
        let says = headers.get("connection").is_some_and(|value| value == "close");
        assert_eq!((status.as_u16(), says), (expected, closes), "{path}");
    }
}

#[tokio::test]
async fn a_worker_that_dies_before_its_first_byte_is_replaced_once() {
    for torn in ["", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"] {
        let models = FakeModels::new();
        worker(&models, "worker", Router::new().fallback(mirror));
        let asked = raw_worker(&models, "flaky", torn);
        let server = start(Arc::clone(&models), "", false, settings()).await;
        let (status, body) = text(post(server.address, CHAT, for_model("flaky", false)).await).await;
        assert_eq!(status, 200, "{body}");
        assert_eq!((asked.load(Ordering::SeqCst), models.routed.load(Ordering::SeqCst)), (1, 2));
        assert_eq!(models.sink.ended.load(Ordering::SeqCst), 2, "the first route ended too");
    }
}

#[tokio::test]
async fn a_worker_that_dies_again_is_a_502() {
    for torn in ["", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n"] {
        let models = FakeModels::new();
        let asked = raw_worker(&models, "worker", torn);
        let server = start(Arc::clone(&models), "", false, settings()).await;
        let (status, code, _) = refusal(post(server.address, CHAT, for_model("chat", false)).await).await;
        assert_eq!((status, code.as_str()), (502, "worker_lost"));
        assert_eq!(asked.load(Ordering::SeqCst), 2, "asked twice, not more");
    }
}

#[tokio::test]
async fn a_worker_nobody_can_reach_is_a_502_after_a_few_tries() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let (status, code, _) = refusal(post(server.address, CHAT, for_model("gone", false)).await).await;
    assert_eq!((status, code.as_str()), (502, "worker_lost"));
    assert!((3..=8).contains(&models.routed.load(Ordering::SeqCst)));
}

#[tokio::test]
async fn the_shelf_hears_that_no_byte_comes_and_clients_why_a_worker_was_ended() {
    for (head, stream) in [("", false), ("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", true)]
    {
        let models = FakeModels::new();
        let listener = tokio::net::UnixListener::bind(models.socket("worker")).expect("a socket");
        let seen = Arc::clone(&models.sink);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                client.write_all(head.as_bytes()).await.expect("read");
                // It says no more, until somebody has heard of that; then it is gone.
                let before = seen.no_bytes.load(Ordering::SeqCst);
                while seen.no_bytes.load(Ordering::SeqCst) < before + 2 {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        });
        let server = start(models, "", false, settings()).await;
        let (status, body) = text(post(server.address, CHAT, for_model("hung", stream)).await).await;
        assert_eq!(status, if stream { 200 } else { 502 }, "{body}");
        assert!(body.contains("worker_lost"), "{body}");
        assert!(body.contains("it has answered nothing for 60 s, and was ended"), "{body}");
    }
}

#[tokio::test]
async fn the_shelf_hears_that_an_answer_goes_on() {
    let models = FakeModels::new();
    let listener = tokio::net::UnixListener::bind(models.socket("worker")).expect("a socket");
    let seen = Arc::clone(&models.sink);
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a request");
        let (mut request, mut client) = client.into_split();
        // Whoever leaves what it was sent unread breaks the connection.
        tokio::spawn(async move { tokio::io::copy(&mut request, &mut tokio::io::sink()).await });
        client.write_all(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n").await.expect("read");
        // Events, until somebody has heard of them a second time.
        while seen.more_bytes.load(Ordering::SeqCst) < 2 {
            client.write_all(b"data: {}\n\n").await.expect("read");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
    let server = start(models, "", false, settings()).await;
    let (status, body) = text(post(server.address, CHAT, for_model("chat", true)).await).await;
    assert!(status == 200 && body.starts_with("data: {}\n\n") && !body.contains("error"), "{body}");
}

#[tokio::test]
async fn a_worker_that_dies_in_mid_stream_ends_it_with_an_error_event() {
    for (tail, gap) in [("14\r\ndata: {\"n\": 12345}\n\n\r\n", ""), ("9\r\ndata: {\"n\r\n", "\n\n")] {
        let models = FakeModels::new();
        let answer = format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n{tail}"
        );
        raw_worker(&models, "worker", answer.leak());
        let server = start(models, "", false, settings()).await;
        let (status, body) = text(post(server.address, CHAT, for_model("chat", true)).await).await;
        assert_eq!(status, 200);
        let error = body.rfind("data: {\"error\"").expect("an error event");
        assert!(body[..error].ends_with("\n\n") && body.contains("worker_lost"), "{body}");
        assert_eq!(body[..error].ends_with("{\"n\n\n"), !gap.is_empty(), "{body}");
    }
}

#[tokio::test]
async fn a_worker_that_dies_in_mid_body_tears_the_answer() {
    let models = FakeModels::new();
    raw_worker(&models, "worker", "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345");
    let server = start(models, "", false, settings()).await;
    let response = post(server.address, CHAT, for_model("chat", false)).await;
    assert!(response.into_body().collect().await.is_err(), "half an answer must not look whole");
}

#[tokio::test]
async fn connections_to_workers_are_used_again_and_replaced_when_stale() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let models = FakeModels::new();
    let listener = tokio::net::UnixListener::bind(models.socket("worker")).expect("a socket");
    let connections = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(async move {
                // Two requests a connection, then it is closed without a word.
                for _ in 0..2 {
                    let mut request = vec![0; 4096];
                    if stream.read(&mut request).await.unwrap_or(0) == 0 {
                        return;
                    }
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                }
            });
        }
    });
    let server = start(models, "", false, settings()).await;
    for _ in 0..6 {
        let (status, body) = text(post(server.address, CHAT, for_model("chat", false)).await).await;
        assert_eq!((status.as_u16(), body.as_str()), (200, "ok"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(connections.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_request_counts_for_its_keys_name_and_its_cached_prefixes_can_be_its_own() {
    let alice = format!("Bearer {}", support::KEY_OF_ALICE);
    let unnamed = format!("Bearer {}", support::KEY);
    for (server, separate) in [("", false), ("separate_keys = true\napi_key_file = '/keys'", true)] {
        let models = FakeModels::new();
        worker(&models, "worker", Router::new().fallback(mirror));
        let server = start(Arc::clone(&models), server, true, settings()).await;
        let mut salts = Vec::new();
        for key in [&alice, &unnamed, &alice] {
            let headers = [support::JSON, ("authorization", key), ("x-shoal-cache-salt", "of-my-own")];
            let (_, echo) =
                text(ask(server.address, "POST", CHAT, &headers, for_model("chat", false)).await).await;
            assert!(!echo.contains("of-my-own"), "{echo}");
            let salt = echo.lines().find_map(|line| line.strip_prefix("x-shoal-cache-salt="));
            salts.push(salt.map(str::to_owned));
        }
        assert_eq!(*models.callers.lock(), ["alice", "key 1", "alice"].map(|name| Some(name.to_owned())));
        assert!(salts.iter().all(|salt| salt.is_some() == separate), "{salts:?}");
        assert!(!separate || salts[0] == salts[2] && salts[0] != salts[1], "{salts:?}");
        let headers = [("authorization", &*alice)];
        let (_, figures) = text(ask(server.address, "GET", "/metrics", &headers, "").await).await;
        assert!(figures.contains("shoal_key_requests_total{key=\"alice\",status=\"200\"} 2"), "{figures}");
        assert!(!figures.contains(support::KEY_OF_ALICE) && !figures.contains(support::KEY));
    }
}

#[tokio::test]
async fn models_are_listed() {
    let server = start(FakeModels::new(), "", false, settings()).await;
    let (status, list) = text(get(server.address, "/v1/models").await).await;
    let list: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    assert_eq!((status.as_u16(), &list["object"]), (200, &"list".into()));
    assert_eq!(list["data"][0]["id"], "chat");
    assert_eq!(list["data"][0]["object"], "model");
    let (status, model) = text(get(server.address, "/v1/models/slow").await).await;
    assert_eq!(status, 200);
    assert!(model.contains("\"id\":\"slow\""), "{model}");
    let (status, code, _) = refusal(get(server.address, "/v1/models/none").await).await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
}

#[tokio::test]
async fn stopping_lets_answers_finish() {
    let models = FakeModels::new();
    let answer = || async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        "finished"
    };
    worker(&models, "worker", Router::new().fallback(answer));
    let mut server = start(Arc::clone(&models), "", false, settings()).await;
    let address = server.address;
    let answer = tokio::spawn(async move { text(post(address, CHAT, for_model("chat", false)).await).await });
    let watching = get(address, "/api/v1/events").await;
    until("it is on its way", || models.routed.load(Ordering::SeqCst) == 1).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    server.stop.cancel();
    assert_eq!(answer.await.expect("answered").1, "finished");
    let task = server.task.take().expect("running");
    tokio::time::timeout(Duration::from_secs(30), task).await.expect("ended").expect("ran").expect("well");
    whole(watching).await;
    assert!(tokio::net::TcpStream::connect(address).await.is_err(), "nobody listens any more");
}
