// The token streams of sockets.py from Go's net/http, without a library: go build -o stream stream.go && ./stream PORT
package main

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"time"
)

var frame = []byte("data: token\n\n")

func stream(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	kind := query.Get("kind")
	count, _ := strconv.Atoi(query.Get("count"))
	rate, _ := strconv.ParseFloat(query.Get("rate"), 64)
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	flusher := w.(http.Flusher)
	gone := r.Context().Done()
	begun := time.Now()
	tokens := make(chan []byte)
	group := 1
	if kind == "burst of 4" {
		group = 4
	}
	if kind == "single" || kind == "burst of 4" {
		// A suspension of the producer is a hand-over between goroutines.
		go func() {
			for i := 0; i < count; i += group {
				select {
				case tokens <- frame:
				case <-gone:
					return
				}
			}
		}()
	}
	for i := 0; i < count; i++ {
		if kind == "paced" {
			time.Sleep(time.Until(begun.Add(time.Duration(float64(i) / rate * 1e9))))
		} else if kind != "unpaced" && i%group == 0 {
			<-tokens
		}
		if _, err := w.Write(frame); err != nil {
			return
		}
		// As each item of an ASGI application leaves with its `send`.
		flusher.Flush()
	}
}

func main() {
	http.HandleFunc("/", stream)
	if err := http.ListenAndServe("127.0.0.1:"+os.Args[1], nil); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
