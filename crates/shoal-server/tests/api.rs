//! Managing, watching, and who may: with a shelf that writes down what it is told.

mod support;

use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::Value;
use std::sync::Arc;
use support::{FakeModels, JSON, KEY, ask, get, post, refusal, settings, start, text, whole};

#[tokio::test]
async fn orders_reach_the_shelf() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    for (path, body) in [
        ("chat/wake", ""),
        ("chat/sleep", r#"{"keep": 0.4}"#),
        ("chat/pin", r#"{"pinned": true}"#),
        ("chat/pin", r#"{"pinned": false}"#),
    ] {
        let (status, body) = text(post(server.address, &format!("/api/v1/models/{path}"), body).await).await;
        assert_eq!(status, 200, "{path}: {body}");
        assert!(body.contains("\"bytes\":2097152"), "{body}");
    }
    assert_eq!(*models.orders.lock(), ["wake chat", "sleep chat 0.4", "pin chat true", "pin chat false"]);
}

#[tokio::test]
async fn wrong_orders_change_nothing() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    for (path, body, expected, expected_code) in [
        ("none/wake", "{}", 404, "model_not_found"),
        ("broken/wake", "{}", 409, "refused"),
        ("chat/sleep", r#"{"keep": 1.5}"#, 400, "out_of_range"),
        ("chat/sleep", r#"{"keep": "all"}"#, 400, "invalid_json"),
        ("chat/sleep", r#"{"kep": 0.5}"#, 400, "invalid_json"),
        ("chat/sleep", "[0.5]", 400, "invalid_json"),
        ("chat/wake", r#"{"wait_s": -1}"#, 400, "out_of_range"),
        ("chat/wake", r#"{"wait_s": 1e300}"#, 400, "out_of_range"),
        ("chat/fly", "{}", 404, "unknown_url"),
    ] {
        let (status, code, _) =
            refusal(post(server.address, &format!("/api/v1/models/{path}"), body).await).await;
        assert_eq!((status, code.as_str()), (expected, expected_code), "{path} {body}");
    }
    let long = format!("{{\"keep\": 0.5{}}}", " ".repeat(70_000));
    let (status, code, _) = refusal(post(server.address, "/api/v1/models/chat/sleep", long).await).await;
    assert_eq!((status, code.as_str()), (413, "request_too_large"));
    for (path, expected_code) in [
        ("/v1/models/%FF", "invalid_path"),
        ("/api/v1/models/%FF/log", "invalid_path"),
        ("/api/v1/models/chat/log?bytes=many", "invalid_query"),
        ("/api/v1/events?since=-1", "invalid_query"),
    ] {
        let (status, code, _) = refusal(get(server.address, path).await).await;
        assert_eq!((status, code.as_str()), (400, expected_code), "{path}");
    }
    let (status, code, _) = refusal(get(server.address, "/api/v1/models/chat/wake").await).await;
    assert_eq!((status, code.as_str()), (405, "method_not_allowed"));
    assert!(models.orders.lock().is_empty());
}

#[tokio::test]
async fn orders_from_elsewhere_are_refused() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let host = server.address.to_string();
    let own = format!("http://{host}");
    let path = "/api/v1/models/chat/wake";
    for (headers, expected, expected_code) in [
        (vec![("content-type", "text/plain")], 415, "not_json"),
        (vec![], 415, "not_json"),
        (vec![JSON, ("origin", "http://evil.example")], 403, "origin_not_allowed"),
        (vec![JSON, ("origin", "null")], 403, "origin_not_allowed"),
        (vec![JSON, ("sec-fetch-site", "cross-site")], 403, "origin_not_allowed"),
        (vec![JSON, ("host", "evil.example")], 403, "host_not_allowed"),
        (vec![JSON, ("host", "evil.example"), ("origin", "http://evil.example")], 403, "host_not_allowed"),
    ] {
        let (status, code, _) = refusal(ask(server.address, "POST", path, &headers, "{}").await).await;
        assert_eq!((status, code.as_str()), (expected, expected_code), "{headers:?}");
    }
    let (status, code, _) =
        refusal(ask(server.address, "GET", "/api/v1/state", &[("host", "rebound.example")], "").await).await;
    assert_eq!((status, code.as_str()), (403, "host_not_allowed"));
    let headers = [("content-type", "application/json; charset=utf-8"), ("origin", own.as_str())];
    assert_eq!(ask(server.address, "POST", path, &headers, "{}").await.status(), 200);
    let chat =
        ask(server.address, "POST", "/v1/chat/completions", &[JSON, ("origin", "http://evil.example")], "{}");
    assert_eq!(chat.await.status(), 403);
    assert_eq!(models.orders.lock().len(), 1);
}

#[tokio::test]
async fn with_keys_nothing_is_told_without_one() {
    let server = start(FakeModels::new(), "", true, settings()).await;
    let bearer = format!("Bearer {KEY}");
    let wrong = format!("Bearer {KEY}0");
    for path in
        ["/v1/models", "/v1/models/chat", "/api/v1/state", "/api/v1/events", "/metrics", "/api/v1/nowhere"]
    {
        let response = get(server.address, path).await;
        assert_eq!(response.headers()["www-authenticate"], "Bearer realm=\"shoal\"");
        let (status, code, _) = refusal(response).await;
        assert_eq!((status, code.as_str()), (401, "missing_api_key"), "{path}");
        let with_wrong = ask(server.address, "GET", path, &[("authorization", &wrong)], "").await;
        assert_eq!(refusal(with_wrong).await.1, "invalid_api_key");
    }
    for path in ["/v1/models", "/api/v1/state", "/metrics"] {
        assert_eq!(ask(server.address, "GET", path, &[("authorization", &bearer)], "").await.status(), 200);
    }
    for path in ["/", "/healthz", "/openapi.json"] {
        assert_eq!(get(server.address, path).await.status(), 200, "{path}");
    }
    let order = post(server.address, "/api/v1/models/chat/wake", "{}").await;
    assert_eq!(order.status(), 401);
}

/// Reads server-sent events until `count` with data came.
async fn events(
    mut response: axum::http::Response<hyper::body::Incoming>,
    count: usize,
) -> Vec<(String, Value)> {
    let mut text = String::new();
    let mut events = Vec::new();
    while events.len() < count {
        let frame = tokio::time::timeout(Duration::from_secs(30), response.frame()).await.expect("in time");
        let frame = frame.expect("more").expect("whole").into_data().expect("data");
        text.push_str(std::str::from_utf8(&frame).expect("text"));
        while let Some(end) = text.find("\n\n") {
            let event: String = text.drain(..end + 2).collect();
            let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name).map(str::trim));
            if let Some(data) = field("data:") {
                let name = field("id:").or(field("event:")).unwrap_or_default().to_owned();
                events.push((name, serde_json::from_str(data).expect("JSON")));
            }
        }
    }
    events
}

#[tokio::test]
async fn events_come_with_ids_and_can_be_resumed() {
    let models = FakeModels::new();
    models.event(true);
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let live = get(server.address, "/api/v1/events").await;
    assert_eq!(live.headers()["content-type"], "text/event-stream");
    for pinned in [false, true, false] {
        models.event(pinned);
    }
    let live = events(live, 3).await;
    let ids: Vec<&str> = live.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!(ids, ["2", "3", "4"], "only what happened since");
    assert_eq!((&live[0].1["kind"], &live[0].1["model"]), (&"pinned".into(), &"chat".into()));

    let resumed = ask(server.address, "GET", "/api/v1/events", &[("last-event-id", "2")], "").await;
    assert_eq!(events(resumed, 2).await[0].0, "3");
    let all = get(server.address, "/api/v1/events?since=0").await;
    assert_eq!(events(all, 4).await[0].0, "1");
    for _ in 0..30 {
        models.event(true);
    }
    let missed = events(get(server.address, "/api/v1/events?since=0").await, 17).await;
    assert_eq!((missed[0].0.as_str(), &missed[0].1["oldest_kept"]), ("missed", &19.into()));
    assert_eq!((missed[1].0.as_str(), missed[16].0.as_str()), ("19", "34"));
}

#[tokio::test]
async fn a_watcher_that_falls_behind_hears_every_event_that_is_kept() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let live = get(server.address, "/api/v1/events").await;
    for _ in 0..200 {
        models.event(true);
    }
    let got = events(live, 17).await;
    assert_eq!((got[0].0.as_str(), got[16].0.as_str()), ("missed", "200"));
}

#[tokio::test]
async fn watchers_are_bounded_and_hear_a_heartbeat() {
    let server = start(FakeModels::new(), "", false, settings()).await;
    let mut watching = Vec::new();
    for _ in 0..64 {
        watching.push(get(server.address, "/api/v1/events").await);
    }
    let (status, code, _) = refusal(get(server.address, "/api/v1/events").await).await;
    assert_eq!((status, code.as_str()), (503, "too_many_watchers"));
    let mut one = watching.pop().expect("one");
    for _ in 0..3 {
        let frame = tokio::time::timeout(Duration::from_secs(30), one.frame()).await.expect("in time");
        assert!(frame.expect("more").expect("whole").data_ref().expect("data").starts_with(b":"));
    }
}

#[tokio::test]
async fn state_log_metrics_and_description() {
    let models = FakeModels::new();
    let server = start(Arc::clone(&models), "", false, settings()).await;
    let (_, state) = text(get(server.address, "/api/v1/state").await).await;
    let state: Value = serde_json::from_str(&state).expect("JSON");
    assert_eq!((&state["device"]["name"], &state["models"][0]["name"]), (&"sim".into(), &"chat".into()));

    let (status, code, _) = refusal(get(server.address, "/api/v1/models/chat/log").await).await;
    assert_eq!((status, code.as_str()), (404, "no_log"));
    std::fs::write(models.socket("log"), "first <b>line</b>\nlast line\n").expect("written");
    let (_, headers, log) = whole(get(server.address, "/api/v1/models/chat/log?bytes=15").await).await;
    assert_eq!(
        (headers["content-type"].as_bytes(), &log[..]),
        (&b"text/plain; charset=utf-8"[..], &b"last line\n"[..])
    );
    let (status, _, _) = refusal(get(server.address, "/api/v1/models/none/log").await).await;
    assert_eq!(status, 404);

    support::worker(&models, "worker", axum::Router::new().fallback(|| async { "an answer" }));
    assert_eq!(
        text(post(server.address, "/v1/embeddings", r#"{"model":"chat","input":"x"}"#).await).await.1,
        "an answer"
    );
    post(server.address, "/v1/chat/completions", r#"{"model":"broken","messages":[0]}"#).await;
    post(server.address, "/v1/chat/completions", r#"{"model":"no\nbody"}"#).await;
    let (_, metrics) = text(get(server.address, "/metrics").await).await;
    for line in [
        "shoal_requests_total{model=\"broken\",status=\"503\"} 1",
        "shoal_requests_total{model=\"\",status=\"404\"} 1",
        "shoal_tier_used_bytes{tier=\"host\"} 125829120",
        "shoal_lease_bytes{model=\"chat\",kind=\"kv\"} 8388608",
        "shoal_wakes_total{model=\"chat\"} 2",
        "shoal_first_byte_seconds_count{model=\"chat\",was_asleep=\"false\"} 1",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }

    let (_, api) = text(get(server.address, "/openapi.json").await).await;
    let api: Value = serde_json::from_str(&api).expect("JSON");
    for path in ["/api/v1/state", "/api/v1/models/{name}/sleep", "/api/v1/events", "/healthz"] {
        assert!(api["paths"].get(path).is_some(), "{path} is not declared");
    }
    assert!(api["components"]["schemas"]["ShelfSnapshot"]["properties"]["models"].is_object());
}

#[tokio::test]
async fn the_page_is_guarded_by_its_policy() {
    let server = start(FakeModels::new(), "", false, settings()).await;
    let (_, headers, page) = whole(get(server.address, "/").await).await;
    let page = String::from_utf8(page.to_vec()).expect("text");
    let policy = headers["content-security-policy"].to_str().expect("text");
    let nonce =
        policy.split("script-src 'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
    assert_eq!(nonce.len(), 36);
    assert!(policy.starts_with("default-src 'none'") && !policy.contains("unsafe"), "{policy}");
    assert!(page.contains(&format!("<script nonce=\"{nonce}\">")), "the script carries it");
    for careless in [
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "onclick=",
        " style=\"",
        "NONCE",
    ] {
        assert!(!page.contains(careless), "{careless} in the page");
    }
    assert_eq!(
        (&headers["x-content-type-options"], &headers["x-frame-options"]),
        (&"nosniff".parse().expect("a value"), &"DENY".parse().expect("a value"))
    );
    let (_, again, _) = whole(get(server.address, "/").await).await;
    assert_ne!(again["content-security-policy"], headers["content-security-policy"]);
}
