// SPDX-License-Identifier: MIT
// java EchoClient HOST PORT: sends the lines of standard input to an echo service, and prints what
// comes back. Says "ready" when it is connected. It sets no option of its socket.

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintWriter;
import java.net.Socket;

public class EchoClient {
    public static void main(String[] arguments) throws IOException {
        try (Socket socket = new Socket(arguments[0], Integer.parseInt(arguments[1]))) {
            System.out.println("ready");
            var typed = new BufferedReader(new InputStreamReader(System.in));
            var echo = new BufferedReader(new InputStreamReader(socket.getInputStream()));
            var service = new PrintWriter(socket.getOutputStream(), true);
            for (String line; (line = typed.readLine()) != null; ) {
                service.println(line);
                System.out.println(echo.readLine());
            }
        }
    }
}
